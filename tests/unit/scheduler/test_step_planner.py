"""One small test for each rule of a step: what a batch holds, who is admitted, and who is preempted."""

from __future__ import annotations

from support.scheduler.scheduling import EOS, finish, formed, make, request, returned, step

from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason
from nanoflow_backend.scheduler.scheduler import Scheduler


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
