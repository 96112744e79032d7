"""PretendEngine is the real scheduler on a device that only takes time: seconds pass as it says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from nanoflow_backend.bench.pretend.host_memory import HostMemory, PretendLink
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import Batch, Delta, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

WORD = 1


def say_words(batch: Batch) -> Sampled:
    """Every token of every answer is the same."""
    return Sampled(batch.step, [WORD] * len(batch.sampled_slots))


class PretendClock:
    """Seconds from the start, as somebody says."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class PretendEngine:
    """Results come back one step late, as in the engine; a step that computes nothing ends with the next transfer.

    Args:
        scheduler: fresh.
        step_s: what a step with tokens takes.
        clock: that of the scheduler, where something in that depends on time.
        sample: what a step samples; called when it begins.
        link: to host memory, where the scheduler has tiers.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        step_s: Callable[[Batch], float],
        clock: PretendClock,
        sample: Callable[[Batch], Sampled] = say_words,
        link: PretendLink | None = None,
    ) -> None:
        self.steps = self.computed_tokens = self.computed_prompt_tokens = 0
        self.scheduler, self.clock = scheduler, clock
        self._step_s, self._sample, self._link = step_s, sample, link
        self._in_flight: deque[Sampled] = deque()

    @classmethod
    def before(
        cls,
        host: HostMemory | None,
        limits: SchedulerLimits,
        step_s: Callable[[Batch], float],
        *,
        prefix_caching: bool = True,
    ) -> PretendEngine:
        """One with host memory behind it, or none, whose answers are as long as they are asked to be."""
        clock = PretendClock()
        lower = host.tiers(limits.page_tokens, clock) if host else None
        scheduler = Scheduler(limits, eos_token_ids=[], prefix_caching=prefix_caching, clock=clock, lower=lower)
        return cls(scheduler, step_s, clock, link=PretendLink(host, limits.page_tokens) if host else None)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def step(self) -> list[Delta]:
        """The next step, and what the one before has sampled.

        Raises:
            RuntimeError: the scheduler has work and runs nothing.
        """
        batch = self.scheduler.schedule()
        if batch is not None:
            self._run(batch)
        elif not self._in_flight:
            raise RuntimeError(f"{self.scheduler.stats}: there is work, and nothing runs")
        wait = len(self._in_flight) > (batch is not None and batch.tokens > 0)
        # what has moved is told as of now: the engine asks when it collects
        transfers = self._link.report(self.clock()) if wait and self._link else None
        return self.scheduler.retire(replace(self._in_flight.popleft(), transfers=transfers) if wait else None)

    def _run(self, batch: Batch) -> None:
        sampled = self._sample(batch)
        if self._link:
            self._link.begin(batch.transfers, self.clock())
        if batch.tokens:
            self.clock.sleep(self._step_s(batch))
        elif self._link and (next_end_s := self._link.next_end_s) is not None:
            self.clock.now_s = max(self.clock(), next_end_s)
        self.steps += 1
        self.computed_tokens += batch.tokens
        self.computed_prompt_tokens += sum(len(prefill.token_ids) for prefill in batch.prefills)
        self._in_flight.append(sampled)
