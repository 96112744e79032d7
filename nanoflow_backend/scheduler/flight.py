"""Flight: the steps that were formed and have not come back."""

from __future__ import annotations

from collections import Counter, deque

from nanoflow_backend.scheduler.batch import Sampled
from nanoflow_backend.scheduler.sequence import Sequence


class Flight:
    """Every step that leaves must return, in order.

    Attributes:
        formed: the last step that left.
        returned: the last one that came back.
    """

    def __init__(self) -> None:
        self.formed = 0
        self.returned = 0
        self._steps: deque[list[Sequence]] = deque()  # those that each one samples

    def take_off(self, sampled: list[Sequence]) -> None:
        """One more step is on its way."""
        self.formed += 1
        self._steps.append(sampled)

    def land(self, sampled: Sampled) -> list[Sequence]:
        """The oldest step is back: the sequences that it sampled. Raises: ValueError, it is another."""
        if not self._steps:
            raise ValueError(f"step {sampled.step} came back, and none is in flight")
        step, sequences = self.returned + 1, self._steps[0]
        if (sampled.step, len(sampled.token_ids)) != (step, len(sequences)):
            raise ValueError(
                f"expected {len(sequences)} tokens of step {step}, got {len(sampled.token_ids)} of step {sampled.step}"
            )
        self.returned = step
        return self._steps.popleft()

    def samples(self) -> Counter[int]:
        """How many tokens of each sequence are on their way, by arrival number."""
        return Counter(s.arrival for sampled in self._steps for s in sampled)
