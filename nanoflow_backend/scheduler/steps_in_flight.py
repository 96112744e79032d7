"""StepsInFlight counts the steps that were launched and whose results have not come back."""

from __future__ import annotations

from collections import Counter, deque

from nanoflow_backend.scheduler.batch import Sampled
from nanoflow_backend.scheduler.sequence import Sequence


class StepsInFlight:
    """Every step that is launched must return, in order.

    Attributes:
        last_launched: the number of the last step that was launched; 0 before the first.
        last_returned: the number of the last step whose results came back.
    """

    def __init__(self) -> None:
        self.last_launched = 0
        self.last_returned = 0
        self._steps: deque[list[Sequence]] = deque()  # those that each one samples

    def launched(self, sampled: list[Sequence]) -> None:
        """A step that samples these sequences was launched."""
        self.last_launched += 1
        self._steps.append(sampled)

    def returned(self, sampled: Sampled) -> list[Sequence]:
        """The sequences that the oldest step sampled, whose results these are. Raises: ValueError, they are not."""
        if not self._steps:
            raise ValueError(f"step {sampled.step} came back, and none is in flight")
        step, sequences = self.last_returned + 1, self._steps[0]
        if (sampled.step, len(sampled.token_ids)) != (step, len(sequences)):
            raise ValueError(
                f"expected {len(sequences)} tokens of step {step}, got {len(sampled.token_ids)} of step {sampled.step}"
            )
        self.last_returned = step
        return self._steps.popleft()

    def samples(self) -> Counter[int]:
        """How many tokens of each sequence are on their way, by arrival number."""
        return Counter(s.arrival_number for sampled in self._steps for s in sampled)
