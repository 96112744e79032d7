"""Deadlines tells which live requests must end now: those that are due, and those that should have begun by now."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import FinishReason

MOST_EACH = 2  # deadlines of a request
SPARE = 64  # entries of ended requests that are not worth a pass


class Deadline(NamedTuple):
    """When a request must have ended, or begun."""

    due: float  # of the scheduler's clock, seconds
    request_id: int
    reason: FinishReason  # why the request ends then: DEADLINE, or QUEUE_TIMEOUT if it has not begun


class Deadlines:
    """A heap, out of whose middle nothing can be taken: entries of requests that have ended stay in it for a while.

    They go when they are due, or all together as soon as they are the majority. So memory follows what lives, however
    far away deadlines are, and a request costs a constant time.
    """

    def __init__(self) -> None:
        self._heap: list[Deadline] = []
        self._live: dict[int, tuple[Deadline, ...]] = {}  # by request

    def __bool__(self) -> bool:
        return bool(self._live)

    def __len__(self) -> int:
        """Entries in memory, those of ended requests too."""
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Keep a request's deadlines, if it has any, until they are due or `forget` is called."""
        times = ((request.deadline, FinishReason.DEADLINE), (request.queue_deadline, FinishReason.QUEUE_TIMEOUT))
        entries = tuple(Deadline(due, request.id, reason) for due, reason in times if due is not None)
        if entries:
            self._live[request.id] = entries
            for entry in entries:
                heapq.heappush(self._heap, entry)

    def may_be_late_to_begin(self, request_id: int) -> bool:
        """It has a deadline by which it must have begun."""
        return any(entry.reason is FinishReason.QUEUE_TIMEOUT for entry in self._live.get(request_id, ()))

    def forget(self, request_id: int) -> None:
        """The request has ended. One without deadlines is left alone."""
        self._live.pop(request_id, None)
        if len(self._heap) > 2 * MOST_EACH * len(self._live) + SPARE:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)

    def take_due(self, now: float) -> Iterator[Deadline]:
        """Take what is due at `now` out of the heap, the earliest first; each is of a request that lives."""
        while self._heap and self._heap[0].due <= now:
            entry = heapq.heappop(self._heap)
            if self._is_live(entry):
                yield entry

    def _is_live(self, entry: Deadline) -> bool:
        return entry in self._live.get(entry.request_id, ())  # an id may be in its second life, with other deadlines
