"""Times, counts and energy of requests, against a diary kept token by token."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import pairwise
from typing import Any

import pytest

from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Batch, FinishReason, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.observed import Histogram
from nanoflow_backend.scheduler.scheduler import Scheduler

EOS, WORD = 0, 7


class Clock:
    """Every look at it takes a moment, so no two events coincide."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        self.now_s += 1e-7
        return self.now_s


def make(clock: Clock, **changes: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "dense_batch_tokens": 16,
        "chunk_tokens": 8,
        "max_running": 6,
        "max_queue_size": 100,
        "num_pages": 14,
        "page_tokens": 4,
        "max_model_tokens": 48,
        "eos_token_ids": [EOS],
        "clock": clock,
        "forecast": ReserveNothing(),
    }
    settings |= changes
    settings = {"prompt_tokens": settings["dense_batch_tokens"]} | settings
    of_limits = settings.keys() & SchedulerLimits.__dataclass_fields__.keys()
    limits = SchedulerLimits(**{name: settings.pop(name) for name in of_limits})
    return Scheduler(limits, **settings)


class Diary:
    """Runs a scheduler as the engine does, one step ahead or not, and notes each token of a request when it comes."""

    def __init__(
        self, scheduler: Scheduler, clock: Clock, step_s: Any, energy: Any = lambda: None, ahead: bool = True
    ) -> None:
        self.scheduler, self.clock, self.step_s, self.energy, self.ahead = scheduler, clock, step_s, energy, ahead
        self.came_s: defaultdict[int, list[float]] = defaultdict(list)
        self.accounts: dict[int, Account] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.step_tokens: list[int] = []
        self.step_times_s: list[float] = []
        self.spent_j = 0.0
        self._in_flight: tuple[Batch, float] | None = None
        self._returned_s = 0.0
        self._token_energy_j = 0.0

    def step(self, sample: Any = lambda: WORD) -> None:
        offered_j = self.scheduler.observer.token_energy_j
        batch = self.scheduler.schedule()
        formed_s = self.clock.now_s
        if batch:
            self.step_tokens.append(batch.tokens)
            self.spent_j += batch.tokens * self._token_energy_j
            self._token_energy_j = offered_j or 0.0  # taken over between two steps
        self.scheduler.observer.token_energy_j = self.energy()
        self.clock.now_s += self.step_s()
        if not self.ahead:
            self._in_flight = (batch, formed_s) if batch else None
        results = None
        if self._in_flight:
            before, before_formed_s = self._in_flight
            results = Sampled(before.step, [sample() for _ in before.sampled_slots])
            self.step_times_s.append(self.clock.now_s - max(before_formed_s, self._returned_s))
            self._returned_s = self.clock.now_s
        for delta in self.scheduler.retire(results):
            self.came_s[delta.request_id] += [self.clock.now_s] * len(delta.token_ids)
            if delta.finish_reason is not None:
                assert delta.account is not None
                self.accounts[delta.request_id] = delta.account
                self.reasons[delta.request_id] = delta.finish_reason
        self._in_flight = (batch, formed_s) if batch and self.ahead else None
        self.scheduler.check()

    def finish(self, **how: Any) -> None:
        while self.scheduler.has_work or self._in_flight:
            self.step(**how)


def histogram_of(values: list[float], bounds: tuple[float, ...]) -> Histogram:
    expected = Histogram(bounds)
    for value in values:
        expected.counts[sum(bound < value for bound in bounds)] += 1
    expected.total = sum(values)
    return expected


def assert_same(actual: Histogram, values: list[float]) -> None:
    """Values near a bound may fall on either side of it by a tick of the clock; none here are."""
    expected = histogram_of(values, actual.bounds)
    assert actual.counts == expected.counts
    assert actual.total == pytest.approx(expected.total, abs=1e-3)


def test_a_bound_belongs_to_the_bucket_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 4), (2.0, 8), (2.5, 16)):
        histogram.observe(value, times)
    assert histogram.counts == [3, 12, 16]
    assert histogram.total == 0.5 + 2 + 6 + 16 + 40


def test_one_request_in_a_quiet_engine() -> None:
    clock = Clock()
    diary = Diary(make(clock), clock, lambda: 0.31)
    diary.scheduler.add(Request(5, [1] * 12, SamplingParams(max_tokens=4), arrived_s=clock.now_s - 2.0))
    diary.finish()
    account = diary.accounts[5]
    # 12 tokens at 8 a step: two steps; what a step sampled is seen in the next one.
    assert account.queue_time_s == pytest.approx(2.0, abs=1e-4)
    assert account.prefill_time_s == pytest.approx(0.93, abs=1e-4)
    assert account.decode_time_s == pytest.approx(0.93, abs=1e-4)
    assert account.total_time_s == pytest.approx(3.86, abs=1e-4)
    assert account.peak_pages == 4  # 12 and the first 3 of 4 tokens: nobody reads the K and V of the last
    assert account.energy_j is None
    observed = diary.scheduler.observer.observed
    assert (observed.delivered_tokens, observed.ended) == (4, {"length": 1})
    assert_same(observed.first_token_s, [2.93])
    assert_same(observed.inter_token_s, [0.31] * 3)
    assert_same(observed.prompt_tokens, [12])
    assert_same(observed.output_tokens, [4])
    assert_same(observed.dense_batch_fill, [8 / 16, 4 / 16, 1 / 16, 1 / 16, 1 / 16])
    assert sum(observed.step_time_s.counts) == 5


def test_a_request_that_ends_in_the_queue() -> None:
    clock = Clock()
    scheduler = make(clock, max_running=1)
    diary = Diary(scheduler, clock, lambda: 0.01)
    for id in range(2):
        scheduler.add(Request(id, [1] * 4, SamplingParams(max_tokens=9)))
    diary.step()
    clock.now_s += 3.0
    scheduler.cancel(1)
    diary.finish()
    account = diary.accounts[1]
    assert (account.admitted_s, account.first_token_s, account.peak_pages) == (None, None, 0)
    assert account.queue_time_s == account.total_time_s == pytest.approx(3.01, abs=1e-4)
    assert account.prefill_time_s == account.decode_time_s == 0
    assert scheduler.observer.observed.ended == {"cancelled": 1, "length": 1}
    assert sum(scheduler.observer.observed.total_time_s.counts) == 1, "a cancelled request has no whole result"


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_random_histories_match_the_diary(seed: int, ahead: bool) -> None:
    """Preemptions, waits for a page, ends of every kind: each time, each count and the whole energy."""
    draw = random.Random(seed)
    clock = Clock()
    scheduler = make(clock, num_pages=draw.choice((12, 14, 20, 40)))
    energy_j = draw.choice((lambda: 2.5, lambda: draw.choice((0.5, 2.0, 8.0))))
    scheduler.observer.token_energy_j = 2.5
    diary = Diary(scheduler, clock, lambda: draw.choice((0.0061, 0.0127, 0.034, 0.41)), energy_j, ahead)
    arrived_s: dict[int, float] = {}
    prompts: dict[int, int] = {}
    waited_s: dict[int, float] = {}
    for id in range(40):
        arrived_s[id] = clock.now_s - draw.choice((0.0013, 0.33))
        prompts[id] = draw.randint(1, 30)
        prompt = [draw.randint(1, 9) if draw.random() < 0.5 else 1 for _ in range(prompts[id])]
        scheduler.add(Request(id, prompt, SamplingParams(max_tokens=draw.randint(1, 18)), arrived_s=arrived_s[id]))
        while draw.random() < 0.6:
            diary.step(lambda: EOS if draw.random() < 0.05 else WORD)
        if draw.random() < 0.1:
            scheduler.cancel(draw.randint(0, id), draw.choice((FinishReason.CANCELLED, FinishReason.STOP)))
    diary.finish(sample=lambda: EOS if draw.random() < 0.05 else WORD)

    observed = scheduler.observer.observed
    came_s = diary.came_s
    whole = [id for id, reason in diary.reasons.items() if reason in ("stop", "length")]
    waited_s = {id: account.queue_time_s for id, account in diary.accounts.items() if account.admitted_s is not None}
    assert len(diary.accounts) == 40
    assert_same(observed.inter_token_s, [b - a for times in came_s.values() for a, b in pairwise(times)])
    assert_same(observed.first_token_s, [times[0] - arrived_s[id] for id, times in came_s.items() if times])
    assert_same(observed.queue_time_s, list(waited_s.values()))
    assert_same(observed.total_time_s, [diary.accounts[id].total_time_s for id in whole])
    assert_same(observed.step_time_s, diary.step_times_s)
    assert_same(observed.dense_batch_fill, [tokens / 16 for tokens in diary.step_tokens])
    assert_same(observed.prompt_tokens, [prompts[id] for id in whole])
    assert_same(observed.output_tokens, [len(came_s[id]) for id in whole])
    assert observed.delivered_tokens == sum(map(len, came_s.values()))
    assert observed.computed_tokens == sum(diary.step_tokens)
    assert sum(observed.ended.values()) == 40
    for id, account in diary.accounts.items():
        assert account.arrived_s == arrived_s[id]
        if came_s[id]:
            assert account.first_token_s == pytest.approx(came_s[id][0], abs=1e-4)
            assert account.peak_pages >= -(-prompts[id] // 4)
    assert sum(account.energy_j or 0.0 for account in diary.accounts.values()) == pytest.approx(diary.spent_j)


def test_the_histories_do_preempt_and_wait() -> None:
    """Else the test above would not say what it seems to."""
    clock = Clock()
    scheduler = make(clock, num_pages=12)
    diary = Diary(scheduler, clock, lambda: 0.01)
    for id in range(12):
        scheduler.add(Request(id, [id + 1] * 6, SamplingParams(max_tokens=16)))
    diary.finish()
    assert scheduler.stats.preemptions > 0
    gaps = [b - a for times in diary.came_s.values() for a, b in pairwise(times)]
    assert max(gaps) > 0.015
