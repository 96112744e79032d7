"""Senders are a few threads that turn the engine's news into responses; each request is pinned to one of them.

A response is a blocking round trip of some 100 us, and a step brings news for hundreds of requests. So the engine's
thread only files news; a request that is still queued when more comes gets one response for all of it. The slower the
way out, the larger the responses: back-pressure costs nothing but the size of a delta.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterable

import msgspec

from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.scheduler.deadlines import Deadline, Deadlines
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.reply import Reply

# Of 1, 4 and 16 threads against the 2.51 server, 4 sent 1.5 to 2.6 times what 1 did; 16 no more than 4.
THREADS = 4


class _Live(msgspec.Struct, eq=False):
    reply: Reply
    begun: bool = False
    news: list[Delta | Failure] = []
    queued: bool = False


class Senders:
    """All live requests by id. Thread-safe.

    The engine ends what is overdue, and counts it. Where it does not come to it, `fail_overdue` does: so clients are
    answered in time even if the engine is stuck.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._lock = threading.Lock()
        self._live: dict[int, _Live] = {}
        self._deadlines = Deadlines()  # of these
        self._overdue: dict[int, FinishReason] = {}  # failed here for that, and not ended by the engine yet
        self._closed: Failure | None = None
        self._queues: list[queue.SimpleQueue[int | None]] = [queue.SimpleQueue() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(ids,), name=f"sender-{index}", daemon=True)
            for index, ids in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, request: Request, reply: Reply) -> None:
        """Expect news for a request. Raises the Failure of `close` after it."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            self._live[request.id] = _Live(reply)
            self._deadlines.add(request)

    def begin(self, request_ids: Iterable[int]) -> None:
        """The engine has begun with these: they can no longer be late to begin."""
        with self._lock:
            for request_id in request_ids:
                if (live := self._live.get(request_id)) is not None:
                    live.begun = True

    def file(self, deltas: Iterable[Delta]) -> None:
        """Take a step's news. Ids that are not live are done: what the engine computed beyond a stop string."""
        with self._lock:
            for delta in deltas:
                if self._overdue and delta.finish_reason is not None:
                    self._overdue.pop(delta.request_id, None)  # the engine has counted it
                if (live := self._live.get(delta.request_id)) is not None:
                    live.news.append(delta)
                    if live.reply.awaits(delta):
                        self._queue(delta.request_id, live)

    def fail(self, request_id: int, failure: Failure) -> None:
        """Fail a request that the caller counts."""
        with self._lock:
            self._overdue.pop(request_id, None)
            if (live := self._live.get(request_id)) is not None:
                live.news.append(failure)
                self._queue(request_id, live)

    def fail_overdue(self, now_s: float) -> list[Deadline]:
        """Fail the live requests whose time was over at `now_s`, of `time.monotonic()`; those are returned."""
        with self._lock:
            due = [
                deadline
                for deadline in self._deadlines.take_due(now_s)
                if deadline.reason is FinishReason.DEADLINE or not self._live[deadline.request_id].begun
            ]
            for _, request_id, reason in due:
                self._overdue.setdefault(request_id, reason)
                live = self._live[request_id]
                live.news.append(live.reply.overdue(reason))
                self._queue(request_id, live)
        return due

    def fail_all(self, failure: Failure) -> Counter[str]:
        """The engine is gone: fail every live request. Returns how many the engine has not counted, by reason."""
        with self._lock:
            uncounted = Counter(map(str, self._overdue.values()))
            uncounted[failure.reason] += len(self._live.keys() - self._overdue.keys())
            self._overdue.clear()
            for request_id, live in self._live.items():
                live.news.append(failure)
                self._queue(request_id, live)
        return uncounted

    def close(self, failure: Failure) -> None:
        """Fail every live request, and every later one."""
        with self._lock:
            self._closed = failure
        self.fail_all(failure)

    def live(self) -> list[Reply]:
        """The requests that have no final response yet."""
        with self._lock:
            return [live.reply for live in self._live.values()]

    def stop(self, timeout_s: float) -> None:
        """Send what is filed, then end the threads; give up on those that a dead server still holds."""
        for ids in self._queues:
            ids.put(None)
        for thread in self._threads:
            thread.join(timeout_s)

    def _queue(self, request_id: int, live: _Live) -> None:
        if not live.queued:
            live.queued = True
            self._queues[request_id % len(self._queues)].put(request_id)

    def _run(self, ids: queue.SimpleQueue[int | None]) -> None:
        while (request_id := ids.get()) is not None:
            with self._lock:
                live = self._live.get(request_id)
                if live is None:  # more came while its final response was sent
                    continue
                news, live.news, live.queued = live.news, [], False
            live.reply.feed(news)
            if live.reply.finished:
                with self._lock:
                    del self._live[request_id]
                    self._deadlines.forget(request_id)
