"""KvEventPublisher sends what PageEvents records to whoever subscribes, as vLLM's ZeroMQ publisher does.

A message is three frames: topic, sequence number (8 bytes, the highest first), payload (see schema). Numbers count
batches from 0, those that had to be dropped too: who misses a number asks the replay socket for all from there on, and
gets (topic, number, payload) for each that is kept, then ("", the number -1, "").
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from queue import SimpleQueue
from threading import Lock, Thread
from types import ModuleType
from typing import TYPE_CHECKING

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.engine.kv_events.schema import encode_batch
from nanoflow_backend.kvcache.page_events import PageEvent, PageEvents

if TYPE_CHECKING:
    import zmq

    Socket = zmq.Socket[bytes]

log = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)


class KvEventPublisher:
    """Whoever calls `publish` never waits: two threads of this object encode, send and replay.

    What is queued, kept for replays and sent to a slow subscriber is bounded by `config`.

    Attributes:
        pages: where the scheduler and the tiers record what happens, on the thread that calls `publish`.

    Raises:
        ConfigError: pyzmq is not there, an endpoint cannot be had, or the topic not be made.
    """

    def __init__(self, config: KvEventsConfig) -> None:
        self.pages = PageEvents()
        self._rank = config.data_parallel_rank
        self._topic = config.filled_topic().encode(errors="surrogateescape")
        self._queue: SimpleQueue[tuple[int, float, list[PageEvent]] | None] = SimpleQueue()
        self._max_queue_size = config.max_queue_size
        self._sequence = 0  # of the next batch
        self._dropping = False
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._keeping = Lock()
        self._zmq = _import_zmq()
        self._context = self._zmq.Context()
        try:
            publishing = self._open(self._zmq.PUB, config.hwm, "endpoint", config.own_endpoint, config.binds)
            self._threads = [Thread(target=self._send, args=(publishing,), name="kv-events", daemon=True)]
            if config.own_replay_endpoint is not None:
                most = config.buffer_steps + 1  # a whole replay, and its end
                replaying = self._open(self._zmq.ROUTER, most, "replay_endpoint", config.own_replay_endpoint)
                self._threads.append(Thread(target=self._replay, args=(replaying,), name="kv-replay", daemon=True))
        except BaseException:
            self._context.destroy(linger=0)  # the collector would wait for sockets that it has not closed yet
            raise
        for thread in self._threads:
            thread.start()
        log.info("kv_events: published at %s, replayed at %s", config.own_endpoint, config.own_replay_endpoint)

    def publish(self) -> None:
        """Send what has been recorded since the last call, as one batch."""
        events = self.pages.take()
        if not events:
            return
        if self._queue.qsize() < self._max_queue_size:
            self._queue.put((self._sequence, time.time(), events))
            self._dropping = False
        elif not self._dropping:
            self._dropping = True
            log.warning("kv_events: %d batches wait: dropped from %d on", self._max_queue_size, self._sequence)
        self._sequence += 1

    def close(self) -> None:
        """Send what is queued, and close the sockets. What subscribers have not taken by then is lost."""
        self._queue.put(None)
        self._threads[0].join()
        self._context.term()  # wakes the other thread, and waits until its socket is closed
        for thread in self._threads:
            thread.join()

    def _open(self, kind: int, hwm: int, field: str, endpoint: str, binds: bool = True) -> Socket:
        socket: Socket = self._context.socket(kind)
        socket.linger, socket.sndhwm, socket.ipv6 = 0, hwm, "[" in endpoint
        try:
            (socket.bind if binds else socket.connect)(endpoint)
        except self._zmq.ZMQError as error:
            what = "bind" if binds else "connect to"
            raise ConfigError(f"kv_events.{field}: cannot {what} {endpoint}: {error.strerror}") from None
        return socket

    def _send(self, socket: Socket) -> None:
        with socket:
            while (batch := self._queue.get()) is not None:
                number, ts, events = batch
                payload = encode_batch(ts, events, self._rank)
                with self._keeping:  # first: who hears of a number may ask for all before it
                    self._kept.append((number, payload))
                socket.send_multipart((self._topic, number.to_bytes(8, "big"), payload))

    def _replay(self, socket: Socket) -> None:
        with socket, contextlib.suppress(self._zmq.ContextTerminated):
            while True:
                client, *request = socket.recv_multipart()
                if len(request) != 2 or len(request[1]) != 8:
                    log.warning("kv_events: a replay was asked for otherwise than by an empty frame and 8 bytes")
                    continue
                with self._keeping:
                    kept = list(self._kept)
                first = int.from_bytes(request[1], "big")
                for number, payload in kept:
                    if number >= first:
                        socket.send_multipart((client, b"", self._topic, number.to_bytes(8, "big"), payload))
                socket.send_multipart((client, b"", b"", END, b""))


def open_publisher(config: KvEventsConfig | None) -> KvEventPublisher | None:
    """None: nobody is to be told. Raises: ConfigError as KvEventPublisher does."""
    return None if config is None or config.publisher == "null" else KvEventPublisher(config)


def _import_zmq() -> ModuleType:
    try:
        import zmq
    except ImportError as error:
        raise ConfigError(
            f"kv_events: needs the events extra, pip install 'nanoflow-triton[events]': {error}"
        ) from None
    return zmq
