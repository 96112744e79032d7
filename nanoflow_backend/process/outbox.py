"""Outbox holds messages on their way to a child: whoever puts one in never waits for the child to read."""

from __future__ import annotations

import threading
from collections import deque

import msgspec

from nanoflow_backend.process.child import Child, ChildDied, encode

MOST_BYTES = 64 * 2**20  # of requests that an engine has not read; a long prompt is half a MiB


class OutboxFull(RuntimeError):
    """The child does not read: as much waits for it as may."""


class Outbox:
    """Thread-safe. A thread of its own sends, in order; what is not sent at `close` never will be."""

    def __init__(self, child: Child, most_bytes: int = MOST_BYTES) -> None:
        self._child = child
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = 0  # of those and of the one that is being sent
        self._closed: str | None = None
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: msgspec.Struct, always: bool = False) -> None:
        """Send a message, soon; one that must come through is taken `always`, so it is to be small.

        Raises:
            OutboxFull: the messages that wait have `most_bytes` already.
            ChildDied: after `close`, with what that was told.
        """
        encoded = encode(message)
        with self._changed:
            if self._closed is not None:
                raise ChildDied(self._closed)
            if self._bytes >= self._most_bytes and not always:
                raise OutboxFull(f"the engine has not read {self._bytes >> 20} MiB of requests yet: try again later")
            self._waiting.append(encoded)
            self._bytes += len(encoded)
            self._changed.notify()

    def close(self, why: str) -> None:
        """Take and send no more. Whoever puts something in hears `why`, the first one that was told."""
        with self._changed:
            self._closed = self._closed or why
            self._waiting.clear()
            self._changed.notify()

    def join(self) -> None:
        """After `close`, and with the child's socket at its end: until nothing is being sent."""
        self._thread.join()

    def _run(self) -> None:
        while (encoded := self._next()) is not None:
            try:
                self._child.send_bytes(encoded)
            except ChildDied as death:
                self.close(str(death))
            with self._changed:
                self._bytes -= len(encoded)

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed is not None)
            return self._waiting.popleft() if self._waiting else None
