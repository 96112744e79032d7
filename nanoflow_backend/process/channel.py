"""Channel is how one process sends messages to another, whichever of our ways joins the two."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec


class ChannelClosed(RuntimeError):
    """Nothing comes from the other end any more, and nothing gets there: the message says why."""


class Channel(Protocol):
    """Messages are msgspec bytes, in order. Sending is thread-safe; receiving is for one thread.

    `Child` is one over a socket pair, to a process that we have started; `Link` one over TCP, to another host.
    """

    def send_bytes(self, message: bytes) -> None:
        """Raises: ChannelClosed."""
        ...

    def receive(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        """The next message, waiting for it. Raises: ChannelClosed."""
        ...

    def close(self) -> None:
        """End the conversation: whoever is in `receive`, here or there, hears of it."""
        ...

    def stop(self) -> None:
        """After `close`: wait for the end of what we have started at the other end."""
        ...
