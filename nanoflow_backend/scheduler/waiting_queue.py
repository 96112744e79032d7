"""WaitingQueue: requests without a slot, in the order in which they run."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise

from nanoflow_backend.scheduler.sequence import Sequence, rank


class QueueFull(RuntimeError):
    """The server is saturated: the client may come back later."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting, as many as max_queue_size allows: try again later")


class WaitingQueue:
    """A preempted sequence keeps its arrival number, and so comes back in front of its priority.

    A sorted list: inserting and removing move pointers, microseconds at tens of thousands waiting.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence | None:
        return self._sequences[0] if self._sequences else None

    def push(self, sequence: Sequence) -> None:
        insort(self._sequences, sequence, key=rank)

    def remove(self, sequence: Sequence) -> None:
        index = bisect_left(self._sequences, rank(sequence), key=rank)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise ValueError(f"request {sequence.id} is not waiting")
        del self._sequences[index]

    def check(self) -> None:
        """Raise AssertionError if the order is broken or a sequence is in twice."""
        ranks = [rank(s) for s in self._sequences]
        assert all(a < b for a, b in pairwise(ranks)), "the waiting queue is out of order"
