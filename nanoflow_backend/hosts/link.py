"""Link is a Channel to another host: framed messages over TCP, each with a code that only the two ends can make.

Both ends say every PING_S that they are there. So a cable that is cut, or a host without power, of which TCP itself
hears nothing, ends the link after LOST_S.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import socket
import threading
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from nanoflow_backend.process.channel import ChannelClosed
from nanoflow_backend.process.ticker import Ticker

PING_S, LOST_S = 1.0, 5.0
LENGTH_BYTES, CODE_BYTES, COUNTER_BYTES = 4, 16, 8
MOST_BYTES = 2**28  # of a message; the masks of 2,048 rows of a vocabulary of 256k take 64 MiB
NOTHING = b""  # the message of a ping


class LinkLost(ChannelClosed):
    """The other host, or the way to it, is gone."""


class Keys(NamedTuple):
    """Of one conversation."""

    send: bytes
    receive: bytes


class Link:
    """See Channel. A frame is the message's length, its code, and the message.

    The code covers a frame's number, so none can be left out, repeated, or put in by others; what is in it can be read
    by whoever sees the network's packets.

    Args:
        connection: connected; the link closes it.
        name: what the other end is called in messages.
        period_s, lost_s: how often to say that we are there, and how long the other end may say nothing.
    """

    def __init__(
        self, connection: socket.socket, keys: Keys, name: str, period_s: float = PING_S, lost_s: float = LOST_S
    ) -> None:
        self.name = name
        self.ended: str | None = None  # why
        self._lost_s = lost_s
        self._keys = keys
        self._connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(lost_s)
        self._sending = threading.Lock()
        self._sent = self._received = 0  # frames
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: no more come
        self._reader = threading.Thread(target=self._read, name="link", daemon=True)
        self._reader.start()
        self._pings = Ticker("pings", period_s, self._ping)

    @property
    def address(self) -> str:
        """Ours, that the other end sees or could see."""
        return str(self._connection.getsockname()[0])

    def send(self, message: msgspec.Struct) -> None:
        """Raises: LinkLost."""
        self.send_bytes(msgspec.msgpack.encode(message))

    def send_bytes(self, message: bytes) -> None:
        """See Channel. It waits while the network takes no more, for `lost_s` at most. Raises: LinkLost."""
        if len(message) > MOST_BYTES:
            raise ValueError(f"message to {self.name}: expected at most {MOST_BYTES} bytes, got {len(message)}")
        with self._sending:
            if self.ended is not None:
                raise LinkLost(self.ended)
            head = len(message).to_bytes(LENGTH_BYTES, "big") + _code(self._keys.send, self._sent, message)
            self._sent += 1
            try:
                self._connection.sendall(head + message)
            except OSError as error:
                self._end(f"takes nothing for {self._lost_s:g} s" if isinstance(error, TimeoutError) else _why(error))
                raise LinkLost(self.ended) from None

    def receive(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        """See Channel. Raises: LinkLost, also for a message that is none."""
        try:
            return decoder.decode(self.receive_bytes())
        except msgspec.DecodeError as error:
            self._end(f"sent something else than was expected: {error}")
            raise LinkLost(self.ended) from None

    def receive_bytes(self) -> bytes:
        """The next message as it came. Raises: LinkLost."""
        message = self._messages.get()
        if message is None:
            self._messages.put(None)  # for whoever asks next
            raise LinkLost(self.ended or "closed")
        return message

    def close(self) -> None:
        """See Channel. Harmless when repeated."""
        self._end("this end has closed it")
        self._pings.stop(0)
        if threading.current_thread() is not self._reader:
            self._reader.join(self._lost_s)
        self._connection.close()

    def stop(self) -> None:
        """The other host ends what it has started."""

    def wait_until_closed(self, timeout_s: float) -> None:
        """Until the other end has closed it, or the link is lost."""
        self._reader.join(timeout_s)

    def _read(self) -> None:
        try:
            while True:
                if message := self._read_frame():
                    self._messages.put(message)
        except TimeoutError:
            self._end(f"nothing comes for {self._lost_s:g} s: the host or the network is gone")
        except (OSError, EOFError) as error:
            self._end(_why(error))
        self._messages.put(None)

    def _read_frame(self) -> bytes:
        length = int.from_bytes(self._read_exactly(LENGTH_BYTES), "big")
        if length > MOST_BYTES:
            raise EOFError(f"sent a message of {length} bytes, expected at most {MOST_BYTES}")
        code, message = self._read_exactly(CODE_BYTES), self._read_exactly(length)
        if not hmac.compare_digest(code, _code(self._keys.receive, self._received, message)):
            raise EOFError("sent a message that does not come from who has the secret")
        self._received += 1
        return message

    def _read_exactly(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            part = self._connection.recv(min(size - len(received), 2**20))
            if not part:
                raise EOFError("has closed the link")
            received += part
        return bytes(received)

    def _ping(self) -> None:
        if self.ended is None:
            with contextlib.suppress(LinkLost):
                self.send_bytes(NOTHING)

    def _end(self, why: str) -> None:
        """From any thread; the first reason counts."""
        self.ended = self.ended or f"{self.name}: {why}"
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def _code(key: bytes, number: int, message: bytes) -> bytes:
    code = blake2b(number.to_bytes(COUNTER_BYTES, "big"), key=key, digest_size=CODE_BYTES)
    code.update(message)
    return code.digest()


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
