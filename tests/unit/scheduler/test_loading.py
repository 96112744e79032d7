"""A sequence whose pages come from a lower tier: it is in no step until its load has come back."""

from __future__ import annotations

from support.scheduler.host_tier import HostTier

from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.kvcache.tier import Direction
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Batch, Delta, FinishReason, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

PAGES, PAGE_TOKENS = 6, 2
FIRST = list(range(10, 19))  # four full pages and a token
SECOND = list(range(30, 41))  # needs every page of a device that has PAGES


def make(host: HostTier, num_pages: int = PAGES) -> Scheduler:
    limits = SchedulerLimits(
        dense_batch_tokens=16,
        chunk_tokens=16,
        prompt_tokens=16,
        max_running=4,
        max_queue_size=8,
        num_pages=num_pages,
        page_tokens=PAGE_TOKENS,
        max_model_tokens=64,
    )
    return Scheduler(
        limits,
        eos_token_ids=[0],
        clock=lambda: 0.0,
        forecast=ReserveNothing(),
        lower_tier=host,
    )


def add(scheduler: Scheduler, id: int, prompt: list[int], max_tokens: int = 1) -> None:
    scheduler.add(Request(id, prompt, SamplingParams(max_tokens=max_tokens)))


def formed(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    scheduler.check()
    assert batch is not None
    return batch


def returned(scheduler: Scheduler, batch: Batch) -> list[Delta]:
    deltas = scheduler.retire(Sampled(batch.step, [7] * len(batch.sampled_slots)))
    scheduler.check()
    return deltas


def finish(scheduler: Scheduler) -> None:
    while scheduler.has_work:
        returned(scheduler, formed(scheduler))


def evicted(host: HostTier, num_pages: int = PAGES) -> Scheduler:
    """A scheduler whose device had FIRST, and has given its pages away since."""
    scheduler = make(host, num_pages)
    for id, prompt in enumerate((FIRST, list(range(30, 29 + num_pages * PAGE_TOKENS)))):
        add(scheduler, id, prompt)
        finish(scheduler)
    assert host.stores >= 4
    assert host.loads == 0
    return scheduler


def loading(scheduler: Scheduler, max_tokens: int = 1) -> Batch:
    """The step in which a request that begins with FIRST is admitted."""
    add(scheduler, 2, [*FIRST, 1], max_tokens)
    batch = formed(scheduler)
    assert [(a.slot, t.direction) for a in batch.admitted for t in batch.transfers[-4:]] == [(0, Direction.LOAD)] * 4
    assert [t.page for t in batch.transfers[-4:]] == [page for _, _, page in batch.page_table[:4]]
    return batch


def test_what_was_evicted_is_loaded_and_only_the_rest_is_computed() -> None:
    scheduler = evicted(HostTier(20))
    batch = loading(scheduler)
    assert (batch.tokens, batch.sampled_slots) == (0, [])
    assert scheduler.schedule() is None, "nothing can run while the load is on its way"
    assert returned(scheduler, batch) == []
    batch = formed(scheduler)
    assert [(p.start, p.token_ids) for p in batch.prefills] == [(8, [18, 1])]
    assert not batch.transfers
    (delta,) = returned(scheduler, batch)
    assert (delta.finish_reason, delta.cached_tokens) == (FinishReason.LENGTH, 8)


def test_others_run_while_one_loads() -> None:
    scheduler = evicted(HostTier(20), num_pages=8)
    add(scheduler, 3, [50], max_tokens=8)
    returned(scheduler, formed(scheduler))
    batch = loading_beside_a_decode(scheduler)
    behind = formed(scheduler)  # before the load has come back
    assert (behind.decode_slots, behind.prefills) == ([0], [])
    returned(scheduler, batch)
    batch = formed(scheduler)
    assert [(p.slot, p.start) for p in batch.prefills] == [(1, 8)]
    returned(scheduler, behind)
    returned(scheduler, batch)
    finish(scheduler)


def loading_beside_a_decode(scheduler: Scheduler) -> Batch:
    add(scheduler, 2, [*FIRST, 1])
    batch = formed(scheduler)
    assert (batch.decode_slots, batch.prefills) == ([0], [])
    assert sum(t.direction is Direction.LOAD for t in batch.transfers) == 4
    return batch


def test_a_request_that_is_cancelled_while_it_loads_keeps_its_pages_until_the_load_is_back() -> None:
    scheduler = evicted(HostTier(20))
    batch = loading(scheduler)
    scheduler.cancel(2)
    scheduler.check()
    assert scheduler.stats.used_pages == 5
    (delta,) = returned(scheduler, batch)
    assert delta.finish_reason is FinishReason.CANCELLED
    assert scheduler.stats.used_pages == 0
    assert scheduler.stats.cached_pages >= 4, "what was loaded can be found again"
    assert not scheduler.has_work


def test_two_requests_that_load_the_same_pages_end_with_one_copy() -> None:
    host = HostTier(20)
    scheduler = evicted(host, num_pages=14)
    for id in (4, 5):
        add(scheduler, id, [*FIRST, id])
    batch = formed(scheduler)
    assert len(batch.admitted) == 2
    assert sum(t.direction is Direction.LOAD for t in batch.transfers) == 8
    returned(scheduler, batch)
    finish(scheduler)
    loads = host.loads
    add(scheduler, 6, [*FIRST, 6])
    assert formed(scheduler).prefills[0].start == 8, "the device has them now"
    assert host.loads == loads


def test_content_that_its_own_stores_have_pushed_out_is_computed() -> None:
    """A tier of four slots: taking pages for the request stores others, in place of what was to be loaded."""
    scheduler = evicted(HostTier(4))
    add(scheduler, 2, [*FIRST, 1])
    finish(scheduler)
    assert scheduler.stats.used_pages == 0


def test_without_a_lower_tier_there_are_no_transfers() -> None:
    scheduler = make(HostTier(0))
    for id, prompt in enumerate((FIRST, SECOND, FIRST)):
        add(scheduler, id, prompt)
        while scheduler.has_work:
            batch = formed(scheduler)
            assert batch.transfers == []
            returned(scheduler, batch)
