"""WaitingQueue keeps the sequences without a slot in the order in which they will be served."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from itertools import pairwise

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.sequence import Sequence, State, service_order


class QueueFull(RuntimeError):
    """The server is saturated: the client may come back later."""

    def __init__(self, waiting: int, room: int = 0, wanted: int = 1) -> None:
        """`room` sequences could still come, too few for the `wanted` of one request."""
        full = "as many as max_queue_size allows: try again later"
        partly = f"and max_queue_size leaves room for {room} more, too few for {wanted} at once: try again later"
        super().__init__(f"{waiting} requests are waiting, {partly if room else full}")


def check_can_wait(prompts: int, sequences: int, max_queue_size: int) -> None:
    """Raises: InvalidRequest, where a request has more `sequences`, of all its prompts together, than may ever wait."""
    if sequences > max_queue_size:
        name = "n" if prompts == 1 else "prompts x n"
        raise InvalidRequest(f"{name}: expected at most {max_queue_size} (max_queue_size), got {sequences}")


class WaitingQueue:
    """A preempted sequence keeps its arrival number, and so comes back in front of its priority.

    A sorted list: inserting and removing move pointers, microseconds at tens of thousands waiting. Those that are held
    wait, too, and have no place in it before they are released.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._held = 0

    def __len__(self) -> int:
        """Held ones, too."""
        return len(self._sequences) + self._held

    @property
    def head(self) -> Sequence | None:
        """The next one to be admitted."""
        return self._sequences[0] if self._sequences else None

    def hold(self, sequence: Sequence) -> None:
        sequence.state = State.HELD
        self._held += 1

    def release(self, sequences: Iterable[Sequence]) -> None:
        """Those of them that are held may be admitted from now on."""
        for s in sequences:
            if s.state is State.HELD:
                self._held -= 1
                self.push(s)

    def push(self, sequence: Sequence) -> None:
        sequence.state = State.WAITING
        insort(self._sequences, sequence, key=service_order)

    def remove(self, sequence: Sequence) -> None:
        """Raises: ValueError, it does not wait."""
        if sequence.state is State.HELD:
            self._held -= 1
            return
        index = bisect_left(self._sequences, service_order(sequence), key=service_order)
        if index == len(self._sequences) or self._sequences[index] is not sequence:
            raise ValueError(f"request {sequence.id} is not waiting")
        del self._sequences[index]

    def check(self, held: int) -> None:
        """Raise AssertionError if the order is broken, a sequence is in twice, has ended, or is lost.

        Args:
            held: sequences whose state says so.
        """
        assert held == self._held, f"{self._held} sequences are said to be held, {held} are"
        orders = [service_order(s) for s in self._sequences]
        assert all(a < b for a, b in pairwise(orders)), "the waiting queue is out of order"
        waiting = all(s.state is State.WAITING and s.finish_reason is None for s in self._sequences)
        assert waiting, "the ended do not wait"

    def __iter__(self) -> Iterator[Sequence]:
        """Those that may be admitted, in order."""
        return iter(self._sequences)
