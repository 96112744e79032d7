"""StoreThreads calls a PageStore on threads of its own; whoever asks is told by a ticket, and never waits."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, Full, Queue
from typing import NamedTuple

from nanoflow_backend.kvcache.tier import PageStore

Job = Callable[[], None]


class Ended(NamedTuple):
    """A read or write that has come to its end."""

    ticket: int
    done: bool  # of a write: it was kept; of a read: the payload holds the page


class StoreThreads:
    """Reads and writes have queues of their own: a disk that is busy writing delays no request that waits for a page.

    All methods are for one thread.

    Attributes:
        dropped_writes: not begun, since the queue was full.
        refused_reads: likewise; the page has to be computed.
    """

    def __init__(
        self, store: PageStore, *, readers: int = 4, writers: int = 4, max_reads: int = 256, max_writes: int = 64
    ) -> None:
        """max_reads, max_writes: that wait for a thread.

        A page takes some ten calls of the system, each of which may then wait for the interpreter: beside a busy engine
        four writers do three times as many pages as one.
        """
        self._store = store
        self._reads: Queue[Job | None] = Queue(max(max_reads, readers))
        self._writes: Queue[Job | None] = Queue(max(max_writes, writers))
        self._ended: deque[Ended] = deque()
        self.dropped_writes = self.refused_reads = 0
        self._threads = [
            (threading.Thread(target=self._work, args=(queue,), name=f"disk-kv-{name}", daemon=True), queue)
            for name, queue in [("read", self._reads)] * readers + [("write", self._writes)] * writers
        ]
        for thread, _ in self._threads:
            thread.start()

    def write(self, ticket: int, content: bytes, payload: memoryview, parent: bytes) -> bool:
        """Begin PageStore.write. The payload must not change until `poll` returns the ticket.

        False: it is dropped, and its ticket never comes back.
        """
        try:
            self._writes.put_nowait(partial(self._run, ticket, partial(self._store.write, content, payload, parent)))
        except Full:
            self.dropped_writes += 1
            return False
        return True

    def read(self, ticket: int, content: bytes, payload: memoryview) -> bool:
        """Begin PageStore.read. Nobody else may use the payload until `poll` returns the ticket.

        False: it is not begun, and its ticket never comes back.
        """
        try:
            self._reads.put_nowait(partial(self._run, ticket, partial(self._store.read, content, payload)))
        except Full:
            self.refused_reads += 1
            return False
        return True

    def poll(self) -> list[Ended]:
        """What has ended since the last call, each once."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def close(self, timeout_s: float = 5.0) -> bool:
        """Drop what waits, and end the threads after what they are at. False: the disk does not answer one of them,
        whose payload has to stay where it is.
        """
        for queue in (self._reads, self._writes):
            with suppress(Empty):
                while True:
                    queue.get_nowait()
        for _, queue in self._threads:
            queue.put_nowait(None)
        deadline_s = time.monotonic() + timeout_s
        for thread, _ in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        return not any(thread.is_alive() for thread, _ in self._threads)

    def _work(self, queue: Queue[Job | None]) -> None:
        while (job := queue.get()) is not None:
            job()

    def _run(self, ticket: int, call: Callable[[], bool]) -> None:
        self._ended.append(Ended(ticket, call()))
