"""One small test for each rule of the scheduler. Token 7 is an ordinary token, EOS is 0."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from msgspec import structs

from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason, Sampled, TokenLogprobs
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.waiting_queue import QueueFull

EOS = 0


def make(**changes: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "dense_batch_tokens": 16,
        "chunk_tokens": 16,
        "max_running": 4,
        "max_queue_size": 8,
        "num_pages": 32,
        "page_tokens": 4,
        "max_model_tokens": 64,
        "eos_token_ids": [EOS],
        "clock": lambda: 0.0,
    }
    settings |= changes
    settings = {"prompt_tokens": settings["dense_batch_tokens"]} | settings
    limits = SchedulerLimits(**{name: settings.pop(name) for name in SchedulerLimits.__dataclass_fields__})
    return Scheduler(limits, **settings)


def request(
    id: int, prompt: int | list[int], *, priority: int = 0, deadline: float | None = None, **params: Any
) -> Request:
    ids = [100 * (id + 1) + i for i in range(prompt)] if isinstance(prompt, int) else prompt
    return Request(id, ids, SamplingParams(**{"max_tokens": 10} | params), priority, deadline)


def formed(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    scheduler.check()
    assert batch is not None
    return batch


def returned(scheduler: Scheduler, batch: Batch, *token_ids: int) -> list[Delta]:
    """Retire a batch with these tokens, or 7 for all."""
    deltas = scheduler.retire(Sampled(batch.step, list(token_ids) or [7] * len(batch.sampled_slots)))
    scheduler.check()
    return without_accounts(deltas)


def without_accounts(deltas: list[Delta]) -> list[Delta]:
    """Last deltas have an account, which has tests of its own (test_observer.py)."""
    assert all((delta.account is None) == (delta.finish_reason is None) for delta in deltas)
    return [structs.replace(delta, account=None) for delta in deltas]


def step(scheduler: Scheduler, *token_ids: int) -> list[Delta]:
    """A step whose results come back before the next."""
    return returned(scheduler, formed(scheduler), *token_ids)


def finish(scheduler: Scheduler) -> dict[int, list[int]]:
    """Run until nothing is left. Returns the tokens of each request."""
    tokens: dict[int, list[int]] = {}
    while scheduler.has_work:
        for delta in step(scheduler):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    return tokens


# -- batches


def test_decodes_come_first_and_prefill_fills_the_rest_exactly() -> None:
    s = make()
    s.add(request(0, 5))
    step(s)
    s.add(request(1, 12))
    s.add(request(2, 9))
    batch = formed(s)
    assert (batch.decode_slots, batch.decode_positions) == ([0], [5])
    assert [(p.slot, p.start, len(p.token_ids), p.sample) for p in batch.prefills] == [
        (1, 0, 12, True),
        (2, 0, 3, False),
    ]
    assert batch.tokens == 16
    returned(s, batch)
    batch = formed(s)
    assert [(p.start, len(p.token_ids), p.sample) for p in batch.prefills] == [(3, 6, True)]
    assert batch.sampled_slots == [0, 1, 2]


def test_a_step_takes_so_much_of_prompts_however_many_wait() -> None:
    s = make(prompt_tokens=6)
    for id in range(3):
        s.add(request(id, 5))
    batch = formed(s)
    assert [(p.slot, p.start, len(p.token_ids), p.sample) for p in batch.prefills] == [
        (0, 0, 5, True),
        (1, 0, 1, False),
    ]
    returned(s, batch)
    batch = formed(s)
    assert (batch.decode_slots, batch.tokens) == ([0], 7)
    assert [(p.slot, p.start, len(p.token_ids)) for p in batch.prefills] == [(1, 1, 4), (2, 0, 2)]


def test_a_chunk_is_the_most_of_one_request_in_one_step() -> None:
    s = make(chunk_tokens=5)
    for id in range(4):
        s.add(request(id, 7))
    assert [len(p.token_ids) for p in formed(s).prefills] == [5, 5, 5, 1]


def test_admission_says_what_the_worker_needs() -> None:
    s = make()
    s.add(request(3, 6, seed=9))
    batch = formed(s)
    (admission,) = batch.admitted
    assert (admission.slot, admission.prompt_tokens, admission.params.seed) == (0, 6, 9)
    assert batch.page_table == [(0, 0, 0), (0, 1, 1)]


def test_page_table_entries_come_when_a_page_is_crossed() -> None:
    s = make()
    s.add(request(0, 7))
    new_entries = []
    for _ in range(6):
        batch = formed(s)
        new_entries.append(len(batch.page_table))
        returned(s, batch)
    assert new_entries == [2, 0, 1, 0, 0, 0]


def test_nothing_to_run() -> None:
    s = make()
    assert s.schedule() is None
    assert not s.has_work
    assert s.retire(None) == []


def test_a_missing_seed_is_drawn_from_the_schedulers() -> None:
    def seeds(scheduler_seed: int) -> list[int | None]:
        s = make(seed=scheduler_seed)
        s.add(request(0, 3))
        s.add(request(1, 3))
        return [a.params.seed for a in formed(s).admitted]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2)}) == 4


# -- ends


def test_eos_is_delivered_and_has_no_stop_reason() -> None:
    s = make()
    s.add(request(0, 3))
    assert step(s) == [Delta(0, (7,))]
    assert step(s, EOS) == [Delta(0, (EOS,), finish_reason=FinishReason.STOP)]
    assert not s.has_work
    assert s.stats.overshoot_tokens == 0


def test_eos_seen_one_step_late_costs_one_token_that_is_not_shown() -> None:
    s = make()
    s.add(request(0, 3))
    first, second = formed(s), formed(s)
    assert returned(s, first, EOS)[0].finish_reason == FinishReason.STOP
    assert s.stats.used_pages == 1, "the step in flight still writes the page"
    assert s.schedule() is None
    assert returned(s, second) == []
    assert (s.stats.used_pages, s.stats.overshoot_tokens, s.has_work) == (0, 1, False)


def test_length_is_counted_when_scheduled() -> None:
    s = make()
    s.add(request(0, 3, max_tokens=2))
    first, second = formed(s), formed(s)
    assert s.schedule() is None, "both tokens are on their way"
    assert returned(s, first)[0].finish_reason is None
    assert returned(s, second) == [Delta(0, (7,), finish_reason=FinishReason.LENGTH)]
    assert s.stats.overshoot_tokens == 0


def test_the_model_and_the_cache_end_a_request_too() -> None:
    s = make(max_model_tokens=9)
    s.add(request(0, 6, max_tokens=50))
    assert finish(s) == {0: [7] * 3}
    s = make(num_pages=2)
    s.add(request(0, 6, max_tokens=50))
    assert finish(s) == {0: [7] * 3}, "eight tokens in the cache, and one after them"


def test_stop_token_ids_stop_and_are_named() -> None:
    s = make()
    s.add(request(0, 3, stop_token_ids=(5, EOS)))
    s.add(request(1, 3, stop_token_ids=(5, EOS)))
    first, second = step(s, 5, EOS)
    assert (first.finish_reason, first.stop_reason) == (FinishReason.STOP, 5)
    assert (second.finish_reason, second.stop_reason) == (FinishReason.STOP, None), "EOS is EOS first"


def test_ignore_eos_leaves_the_requests_own_ids() -> None:
    s = make()
    s.add(request(0, 3, ignore_eos=True))
    s.add(request(1, 3, ignore_eos=True, stop_token_ids=(EOS,)))
    first, second = step(s, EOS, EOS)
    assert first.finish_reason is None
    assert (second.finish_reason, second.stop_reason) == (FinishReason.STOP, EOS)


def test_nothing_stops_before_min_tokens() -> None:
    s = make()
    s.add(request(0, 3, min_tokens=3, stop_token_ids=(5,)))
    assert [step(s, token)[0].finish_reason for token in (EOS, 5, EOS)] == [None, None, FinishReason.STOP]


def test_logprobs_travel_with_their_token() -> None:
    s = make()
    s.add(request(0, 3, max_tokens=1))
    s.add(request(1, 3, logprobs=0))
    logprobs = [TokenLogprobs([token], [-0.5], 1) for token in (8, 9)]
    first, second = s.retire(Sampled(formed(s).step, [7, 8], {1: logprobs[0]}))
    assert (first.logprobs, second.logprobs) == (None, [logprobs[0]])
    batch = formed(s)
    assert batch.sampled_slots == [1]
    (last,) = s.retire(Sampled(batch.step, [9], {1: logprobs[1]}))
    assert last.logprobs == [logprobs[1]]


# -- cancel and deadline


def test_cancel_while_waiting() -> None:
    s = make(max_running=1)
    s.add(request(0, 3))
    s.add(request(1, 3))
    step(s)
    s.cancel(1)
    assert step(s) == [Delta(1, (), finish_reason=FinishReason.CANCELLED), Delta(0, (7,))]
    assert s.stats.waiting_requests == 0


def test_cancel_with_a_step_in_flight_keeps_the_pages_until_it_is_back() -> None:
    s = make()
    s.add(request(0, 20))
    batch = formed(s)
    s.cancel(0)
    s.cancel(0)
    s.check()
    assert s.stats.used_pages == 5
    assert s.schedule() is None
    assert returned(s, batch) == [Delta(0, (), finish_reason=FinishReason.CANCELLED)]
    assert (s.stats.used_pages, s.has_work) == (0, False)


def test_cancel_of_an_unknown_or_ended_request_is_nothing() -> None:
    s = make()
    s.add(request(0, 3, max_tokens=1))
    step(s)
    s.cancel(0)
    s.cancel(12)
    assert not s.has_work
    assert s.retire(None) == []


def test_deadlines_end_waiting_and_running_requests() -> None:
    now = 0.0
    s = make(max_running=1, clock=lambda: now)
    s.add(request(0, 3, deadline=5.0))
    s.add(request(1, 3, deadline=2.0))
    assert [d.request_id for d in step(s)] == [0]
    now = 2.0
    assert step(s) == [Delta(1, (), finish_reason=FinishReason.DEADLINE), Delta(0, (7,))]
    now = 5.0
    assert s.schedule() is None
    assert without_accounts(s.retire(None)) == [Delta(0, (), finish_reason=FinishReason.DEADLINE)]
    assert s.stats.used_pages == 0


def test_a_deadline_does_not_reach_the_next_request_of_that_id() -> None:
    now = 0.0
    s = make(clock=lambda: now)
    s.add(request(0, 3, max_tokens=1, deadline=5.0))
    step(s)
    s.add(request(0, 3, max_tokens=2))
    now = 9.0
    assert finish(s) == {0: [7, 7]}


# -- order


def test_first_come_first_served_within_a_priority() -> None:
    s = make(max_running=1)
    for id, priority in ((0, 0), (1, 1), (2, 0), (3, -1)):
        s.add(request(id, 3, priority=priority, max_tokens=1))
    assert [step(s)[0].request_id for _ in range(4)] == [3, 0, 2, 1]


def grown_until_preemption() -> tuple[Scheduler, Batch]:
    """Three requests fill six pages; in the batch returned, each would need another."""
    s = make(num_pages=6, prefix_caching=False, forecast=ReserveNothing())
    for id, priority in ((0, 0), (1, 1), (2, 0)):
        s.add(request(id, 4, priority=priority))
    step(s)
    for _ in range(4):
        step(s)
    assert s.stats.used_pages == 6
    return s, formed(s)


def test_the_lowest_priority_is_preempted_and_loses_nothing() -> None:
    s, batch = grown_until_preemption()
    assert s.stats.preemptions == 1
    assert batch.decode_slots == [0, 1], "requests 0 and 2"
    assert batch.page_table == [(0, 2, batch.page_table[0][2]), (1, 2, batch.page_table[1][2])]
    returned(s, batch)
    assert s.stats.waiting_requests == 1
    readmitted = []
    while s.has_work:
        batch = formed(s)
        if batch.admitted:
            readmitted = batch.prefills
        returned(s, batch)
    (prefill,) = readmitted
    assert (prefill.start, prefill.token_ids) == (0, [200, 201, 202, 203, 7, 7, 7, 7, 7])


def two_that_fill_the_cache() -> Scheduler:
    """Two requests of two pages each, which are all there are. After one more step each needs another."""
    s = make(num_pages=4, prefix_caching=False, forecast=ReserveNothing())
    s.add(request(0, 5, max_tokens=6))
    s.add(request(1, 5, max_tokens=6))
    for _ in range(3):
        step(s)
    return s


def test_the_latest_arrival_is_preempted_among_equals() -> None:
    s = two_that_fill_the_cache()
    step(s)
    s.add(request(2, 4))
    batch = formed(s)
    assert (s.stats.preemptions, batch.decode_slots) == (1, [0])
    while not batch.admitted:
        returned(s, batch)
        batch = formed(s)
    assert batch.prefills[0].token_ids[0] == 200, "the preempted one is in front of later arrivals"


def test_a_victim_in_flight_comes_back_first() -> None:
    s = two_that_fill_the_cache()
    batch = formed(s)
    assert s.schedule() is None, "request 0 waits for the pages of request 1, which a step in flight writes"
    s.check()
    assert s.stats.used_pages == 4
    assert returned(s, batch) == [Delta(0, (7,)), Delta(1, (7,))]
    assert s.stats.used_pages == 2
    assert finish(s) == {0: [7] * 2, 1: [7] * 2}


def test_a_victim_whose_last_token_was_in_flight_has_ended() -> None:
    s = two_that_fill_the_cache()
    batch = formed(s)
    assert s.schedule() is None
    assert [d.finish_reason for d in returned(s, batch, 7, EOS)] == [None, FinishReason.STOP]
    assert s.stats.waiting_requests == 0


def test_the_forecast_learns_from_every_end_after_a_token() -> None:
    class Recorder(ReserveNothing):
        lengths: ClassVar[list[int]] = []

        def record(self, output_tokens: int) -> None:
            self.lengths.append(output_tokens)

    s = make(forecast=Recorder(), max_running=3)
    for id, max_tokens in enumerate((9, 9, 3, 9)):
        s.add(request(id, 3, max_tokens=max_tokens))
    step(s)
    step(s, 7, EOS, 7)
    s.cancel(0)  # as at a stop string
    s.cancel(3)  # it never ran
    finish(s)
    assert Recorder.lengths == [2, 2, 3]


def test_requests_are_admitted_while_the_forecast_fits() -> None:
    s = make(num_pages=9)  # without data, a request of 4 + 14 tokens is expected to take five pages in the end
    for id in range(3):
        s.add(request(id, 4, max_tokens=14))
    assert len(formed(s).admitted) == 1
    s = make(num_pages=12)
    for id in range(3):
        s.add(request(id, 4, max_tokens=14))
    assert len(formed(s).admitted) == 2


def test_one_request_always_runs() -> None:
    s = make(num_pages=2)
    s.add(request(0, 8, max_tokens=50))
    assert finish(s) == {0: [7]}


# -- prefixes


def test_a_prefix_is_shared_from_the_step_after_the_one_that_fills_it() -> None:
    s = make(dense_batch_tokens=32)
    prompt = list(range(1, 11))
    s.add(request(0, prompt))
    s.add(request(1, prompt))
    first = formed(s)
    assert [p.start for p in first.prefills] == [0, 0], "never within the step"
    s.add(request(2, prompt))
    second = formed(s)
    assert [p.start for p in second.prefills] == [8], "but before its results are back"
    returned(s, first)
    assert {d.request_id: d.cached_tokens for d in returned(s, second)} == {0: 0, 1: 0, 2: 8}
    assert (s.stats.prefix_query_tokens, s.stats.prefix_hit_tokens) == (30, 8)


def test_generated_tokens_are_shared_in_the_next_round() -> None:
    s = make()
    s.add(request(0, [1, 2, 3], max_tokens=6))
    assert finish(s) == {0: [7] * 6}
    s.add(request(1, [1, 2, 3, 7, 7, 7, 7, 7, 7, 5]))
    assert formed(s).prefills[0].start == 8


def test_a_shared_page_lives_as_long_as_its_last_reader() -> None:
    s = make()
    prompt = list(range(1, 10))
    s.add(request(0, prompt, max_tokens=2))
    step(s)
    s.add(request(1, prompt, max_tokens=5))
    step(s)
    assert s.stats.used_pages == 3, "request 0 is gone; two shared pages and one of its own"
    finish(s)
    assert s.stats.used_pages == 0


def test_without_prefix_caching_nothing_is_kept() -> None:
    s = make(prefix_caching=False)
    s.add(request(0, 10))
    finish(s)
    assert s.stats.cached_pages == 0


# -- whose turn it is


def order(*arrivals: tuple[float, int], aging_s: float) -> list[int]:
    """The order in which requests of (time, priority) run."""
    now_s = 0.0
    s = make(max_running=1, priority_aging_s=aging_s, clock=lambda: now_s)
    for id, (now_s, priority) in enumerate(arrivals):  # noqa: B007  the clock reads it
        s.add(request(id, 1, priority=priority, max_tokens=1))
    return list(finish(s))


def test_the_urgent_overtake_what_came_so_much_before_and_no_more() -> None:
    assert order((0, 1), (0, 0), (9, 0), (11, 0), (11, -1), aging_s=10) == [1, 4, 2, 0, 3]
    assert order((0, 1), (0, 0), (9, 0), (11, 0), (11, -1), aging_s=0) == [0, 1, 2, 3, 4]


def test_nobody_starves() -> None:
    """Two urgent requests come in the time of one: for ever, and the other one runs."""
    now_s = 0.0
    s = make(max_running=1, priority_aging_s=10, clock=lambda: now_s)
    s.add(request(0, 1, priority=3, max_tokens=1))
    for id in range(1, 200):
        now_s = id / 2
        if s.queue_room:
            s.add(request(id, 1, max_tokens=1))
        if id % 2 == 0 and any(delta.request_id == 0 for delta in step(s)):
            break
    assert 30 <= now_s <= 50


def test_who_has_not_begun_in_time_is_refused() -> None:
    now_s = 0.0
    s = make(max_running=1, clock=lambda: now_s)
    for id in range(3):
        s.add(Request(id, [1, 2], SamplingParams(max_tokens=10), queue_deadline=2.0 * (id + 1)))
    step(s)
    now_s = 5.0
    assert [(d.request_id, d.finish_reason) for d in step(s)] == [(1, FinishReason.QUEUE_TIMEOUT), (0, None)]
    assert finish(s) == {0: [7] * 8, 2: [7] * 10}


def test_a_preempted_request_has_begun() -> None:
    now_s = 0.0
    s = make(num_pages=5, forecast=ReserveNothing(), clock=lambda: now_s)
    for id in range(2):
        s.add(Request(id, [1 + id] * 8, SamplingParams(max_tokens=12), queue_deadline=1.0))
    while not s.stats.preemptions:
        step(s)
    now_s = 2.0
    assert s.stats.waiting_requests == 1
    assert len(finish(s)[1]) > 5


# -- what is refused


def test_bad_requests_are_refused_by_name() -> None:
    s = make(max_model_tokens=200)
    s.add(request(0, 3))
    for bad, message in (
        (request(0, 3), "id: expected one that is not in use, got 0"),
        (request(1, []), "prompt: expected at least one token"),
        (request(1, 129), r"prompt: expected at most 128 tokens .* got 129"),
        (request(1, [3, -1]), r"prompt: expected token ids in 0\.\.2\^31-1, got -1\.\.3"),
        (request(1, [3, 2**31]), "prompt: expected token ids"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            s.add(bad)
    with pytest.raises(InvalidRequest, match="at most 63 tokens"):
        make().add(request(1, 64))
    s.check()
    assert s.stats.waiting_requests == 1


def test_a_full_queue_says_how_long_it_is() -> None:
    s = make(max_queue_size=2, max_running=1)
    for id in range(3):
        s.add(request(id, 3))
    with pytest.raises(QueueFull, match="3 requests are waiting, as many as max_queue_size allows"):
        s.add(request(3, 3))
    step(s)
    with pytest.raises(QueueFull, match="2 requests are waiting"):
        s.add(request(3, 3))
    s.cancel(0)
    step(s)
    s.add(request(3, 3))
    assert s.queue_room == 0


def test_free_slots_are_room_too_unless_there_are_no_pages() -> None:
    s = make(max_queue_size=1, num_pages=4)
    for id in range(5):
        s.add(request(id, 12))
    with pytest.raises(QueueFull, match="5 requests are waiting"):
        s.add(request(5, 12))
    step(s)
    assert (s.stats.running_requests, s.stats.waiting_requests, s.queue_room) == (1, 4, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens: expected at least 1, got 0"),
        ({"prompt_tokens": 0}, "prompt_tokens: expected at least 1, got 0"),
        ({"num_pages": 0}, "num_pages"),
        ({"max_model_tokens": 1}, "max_model_tokens"),
        ({"dense_batch_tokens": 3}, r"dense_batch_tokens: expected at least max_running \(4\), got 3"),
    ],
)
def test_bad_settings_are_refused_by_name(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_results_of_another_step_are_refused() -> None:
    s = make()
    with pytest.raises(ValueError, match="step 1 came back, and none is in flight"):
        s.retire(Sampled(1, []))
    s.add(request(0, 3))
    formed(s)
    with pytest.raises(ValueError, match="expected 1 tokens of step 1, got 0 of step 1"):
        s.retire(Sampled(1, []))
