"""The Observer is told of a scheduler's events, and writes histograms (`Observed`) and requests' accounts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.scheduler.observed import Observed
from nanoflow_backend.scheduler.pace import Pace, StepWork
from nanoflow_backend.scheduler.sequence import Sequence
from nanoflow_backend.scheduler.tiers.rates import Rates

WHOLE = (FinishReason.STOP, FinishReason.LENGTH)  # a request that ends so has all of its result


class _Step(NamedTuple):
    formed_s: float
    work: StepWork
    strays: list[Sequence]  # of the sampled ones, those that were not sampled in the step before


class Observer:
    """Costs a step the same for one request as for a thousand.

    Nearly all tokens of a step belong to requests that had one in the step before, so they share one inter-token time.
    Only the others, which began or paused, have a clock of their own. Likewise the energy of a decode is the growth of
    one sum, to which every step adds what a token costs at that moment.

    Attributes:
        token_energy_j: what a token costs; whoever measures it sets it, from any thread. None: nobody does.
        rates: told how long steps take, and tokens of those that are mostly prompts, if somebody asks.
        pace: told of work and times of the steps that compute something, likewise.
    """

    def __init__(self, clock: Callable[[], float], dense_batch_tokens: int) -> None:
        self.observed = Observed()
        self.token_energy_j: float | None = None
        self.rates: Rates | None = None
        self.pace: Pace | None = None
        self._clock = clock
        self._dense_batch_tokens = dense_batch_tokens
        self._steps: deque[_Step] = deque()  # in flight
        self._resumed: list[Sequence] = []  # since the last step was formed
        self._pausing: list[tuple[int, Sequence]] = []  # with the step, still in flight, that samples its last token
        self._returned_s = 0.0  # when the last step came back
        self._step_time_s = 0.0  # between the last two
        self._stray_tokens = 0  # of the step that is coming back, those that were timed one by one
        self._step_energy_j = 0.0  # of one token of the step that is being formed
        self._decode_energy_j = 0.0  # of a request that has decoded in every step so far

    def arrived(self, s: Sequence, arrived_s: float) -> None:
        s.account.arrived_s = arrived_s

    def admitted(self, s: Sequence) -> None:
        """For the first time."""
        s.account.admitted_s = self._clock()
        self.observed.queue_time_s.observe(s.account.admitted_s - s.account.arrived_s)

    def loading(self, s: Sequence) -> None:
        """Pages of lower tiers are on their way to it."""
        s.account.load_began_s = self._clock()

    def loaded(self, s: Sequence, tokens: int, disk_tokens: int) -> None:
        """So many tokens were loaded instead of computed, some of them from the disk."""
        self.observed.load_time_s.observe(self._clock() - s.account.load_began_s)
        self.observed.host_tokens += tokens - disk_tokens
        self.observed.disk_tokens += disk_tokens
        if not s.preemptions:
            s.account.host_tokens += tokens - disk_tokens
            s.account.disk_tokens += disk_tokens

    def prefilled(self, s: Sequence, tokens: int, complete: bool) -> None:
        """The step that is being formed computes known tokens; those after it decode, when these are complete."""
        s.account.energy_j += tokens * self._step_energy_j
        if complete:
            s.account.decode_mark_j = self._decode_energy_j + self._step_energy_j

    def finishing(self, s: Sequence) -> None:
        """The step that is being formed is its last."""
        self._end_decoding(s, self._decode_energy_j + self._step_energy_j)

    def paused(self, s: Sequence, returned_step: int) -> None:
        """No token of the step that is being formed, nor of those until it resumes. May be told more than once."""
        if s.account.decode_mark_j is None:
            return
        self._end_decoding(s, self._decode_energy_j)
        if s.last_step > returned_step:
            self._pausing.append((s.last_step, s))
        else:
            s.account.last_token_s = self._returned_s

    def resumed(self, s: Sequence) -> None:
        """It has the page that it needs for the step that is being formed. It need not have paused."""
        if s.account.decode_mark_j is None:
            s.account.decode_mark_j = self._decode_energy_j
            self._resumed.append(s)

    def formed(self, work: StepWork, sampled: list[Sequence]) -> None:
        """A step goes out; the first `work.decodes` of the sampled ones decode, the others end their known tokens."""
        self._steps.append(_Step(self._clock(), work, self._resumed + sampled[work.decodes :]))
        self._resumed = []
        self._decode_energy_j += self._step_energy_j
        self._step_energy_j = self.token_energy_j or 0.0
        self.observed.computed_tokens += work.tokens
        self.observed.dense_batch_fill.observe(work.tokens / self._dense_batch_tokens)

    def returned(self, step: int) -> None:
        """The oldest step is back, and nobody has looked at its tokens yet."""
        formed_s, work, strays = self._steps.popleft()
        now_s = self._clock()
        self._step_time_s, self._returned_s = now_s - self._returned_s, now_s
        step_time_s = min(self._step_time_s, now_s - formed_s)
        self.observed.step_time_s.observe(step_time_s)
        if self.rates is not None and work.tokens:
            self.rates.step.measured(1, step_time_s)
            if work.prompt_tokens > work.decodes:
                self.rates.prefill.measured(work.tokens, step_time_s)
        if self.pace is not None and work.tokens:
            self.pace.measured(work, step_time_s)
        alive = [s for s in strays if s.finish_reason is None]
        self._stray_tokens = len(alive)
        for s in alive:
            if s.account.first_token_s is None:
                self._first_token(s, now_s)
            else:
                self.observed.inter_token_s.observe(now_s - s.account.last_token_s)
        if self._pausing:
            for last_step, s in self._pausing:
                if last_step == step:
                    s.account.last_token_s = now_s
            self._pausing = [pausing for pausing in self._pausing if pausing[0] != step]

    def delivered(self, tokens: int) -> None:
        """So many tokens of the step that came back went to requests; the others were sampled after an end."""
        self.observed.delivered_tokens += tokens
        if tokens > self._stray_tokens:
            self.observed.inter_token_s.observe(self._step_time_s, tokens - self._stray_tokens)

    def ended(self, s: Sequence, reason: FinishReason) -> Account:
        """Count the end of a sequence, and return what it took."""
        now_s, observed = self._clock(), self.observed
        self._end_decoding(s, self._decode_energy_j)
        account = Account(
            arrived_s=s.account.arrived_s,
            admitted_s=s.account.admitted_s,
            first_token_s=s.account.first_token_s,
            ended_s=now_s,
            peak_pages=max(s.peak_pages, len(s.pages)),
            energy_j=None if self.token_energy_j is None else s.account.energy_j,
            host_tokens=s.account.host_tokens,
            disk_tokens=s.account.disk_tokens,
        )
        if reason is not FinishReason.REFUSED:  # counted by who refuses, as those are that never came here
            observed.ended[reason] = observed.ended.get(reason, 0) + 1
        if reason in WHOLE:
            observed.decode_time_s.observe(account.decode_time_s)
            observed.total_time_s.observe(account.total_time_s)
            observed.prompt_tokens.observe(s.prompt_tokens)
            observed.output_tokens.observe(s.output_tokens)
        return account

    def _first_token(self, s: Sequence, now_s: float) -> None:
        s.account.first_token_s = now_s
        self.observed.first_token_s.observe(now_s - s.account.arrived_s)
        assert s.account.admitted_s is not None, "a token of a request that was never admitted"
        self.observed.prefill_time_s.observe(now_s - s.account.admitted_s)

    def _end_decoding(self, s: Sequence, energy_j: float) -> None:
        if s.account.decode_mark_j is not None:
            s.account.energy_j += energy_j - s.account.decode_mark_j
            s.account.decode_mark_j = None
