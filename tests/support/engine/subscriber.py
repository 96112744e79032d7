"""Subscriber: sockets as a gateway has them, on the endpoints of one engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Self

import zmq

PATIENCE_MS = 10_000
END = b"\xff" * 8


class Subscriber:
    """A SUB socket, and a DEALER for replays if there is somewhere to ask."""

    def __init__(self, endpoint: str, replay_endpoint: str | None = None, topic: str = "", hwm: int = 1_000) -> None:
        self._context = zmq.Context()
        self.live = self._context.socket(zmq.SUB)
        self.live.set_hwm(hwm)
        self.live.subscribe(topic)
        self.live.rcvtimeo = PATIENCE_MS
        self.live.connect(endpoint)
        self._replay_endpoint = replay_endpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._context.destroy(linger=0)

    def receive(self) -> tuple[bytes, int, bytes]:
        """Topic, number and payload of the next message. Raises: zmq.Again, after a while."""
        topic, number, payload = self.live.recv_multipart()
        assert len(number) == 8
        return topic, int.from_bytes(number, "big"), payload

    def waiting(self) -> Iterator[tuple[bytes, int, bytes]]:
        """What has come already."""
        while self.live.poll(200):
            yield self.receive()

    def replay(self, first: int) -> Iterator[tuple[bytes, int, bytes]]:
        """The messages that are kept, from a number on."""
        assert self._replay_endpoint is not None
        with contextlib.closing(self._context.socket(zmq.DEALER)) as dealer:
            dealer.rcvtimeo, dealer.linger = PATIENCE_MS, 0
            dealer.connect(self._replay_endpoint)
            dealer.send_multipart([b"", first.to_bytes(8, "big")])
            while True:
                empty, topic, number, payload = dealer.recv_multipart()
                assert empty == b""
                if number == END:
                    assert (topic, payload) == (b"", b"")
                    return
                yield topic, int.from_bytes(number, "big"), payload
