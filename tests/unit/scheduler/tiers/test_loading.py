"""A sequence whose pages come from host memory: it reads none before its load has come back, and others run on."""

from __future__ import annotations

import pytest
from support.scheduler.lossy_disk import LossyDisk
from support.scheduler.tiered import FIRST, TieredScheduler, contents, evicted

from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.scheduler.batch import Batch, FinishReason


def loading(s: TieredScheduler, max_tokens: int = 1) -> Batch:
    """The step in which a request that begins with FIRST is admitted."""
    s.add(2, [*FIRST, 1], max_tokens)
    batch = s.form()
    assert [(a.slot, t.move) for a in batch.admitted for t in batch.transfers] == [(0, Move.LOAD)] * 4
    pages = [page for _, _, page in batch.page_table[:4]]
    assert [t.page for t in batch.transfers] == pages[::-1], "from the back"
    return batch


def leave_to_disk(s: TieredScheduler) -> list[bytes]:
    """The contents of FIRST, which only the disk has from now on."""
    chain = contents(FIRST)
    for content in chain:
        s.lower.disk.write(content, [])
    for content in reversed(chain):
        s.host.abandon(content)
    return chain


def test_what_was_evicted_is_loaded_and_only_the_rest_is_computed() -> None:
    s = evicted()
    batch = loading(s)
    assert (batch.tokens, batch.sampled_slots) == (0, [])
    assert s.scheduler.schedule() is None, "nothing can run while a step is on its way"
    assert s.end(batch, moves=()) == []
    waiting = s.form()
    assert (waiting.tokens, waiting.transfers, waiting.admitted) == (0, [], []), "it only waits for the loads"
    s.end(waiting)
    batch = s.form()
    assert [(p.start, p.token_ids) for p in batch.prefills] == [(8, [18, 1])]
    (delta,) = s.end(batch)
    assert (delta.finish_reason, delta.cached_tokens) == (FinishReason.LENGTH, 8)
    assert s.scheduler.stats.prefix_hit_tokens == 8
    assert s.scheduler.observer.observed.load_time_s.counts != []


def test_a_request_goes_on_when_its_last_page_has_come_and_not_before() -> None:
    s = evicted()
    batch = loading(s)
    first, *_ = s.transfers
    s.transfers.remove(first)
    s.end(batch)  # all but one
    s.transfers.append(first)
    waiting = s.form()
    assert not waiting.prefills
    s.end(waiting)
    assert s.form().prefills


def test_others_run_while_one_loads() -> None:
    s = evicted(num_pages=8)
    s.add(3, [50], max_tokens=8)
    s.step()
    s.add(2, [*FIRST, 1])
    batch = s.form()
    assert (batch.decode_slots, batch.prefills) == ([0], [])
    assert sum(t.move is Move.LOAD for t in batch.transfers) == 4
    behind = s.form()  # before the load has come back
    assert (behind.decode_slots, behind.prefills) == ([0], [])
    s.end(batch)
    assert [(p.slot, p.start) for p in s.form().prefills] == [(1, 8)]


def test_a_request_that_is_cancelled_while_it_loads_keeps_its_pages_until_the_load_is_back() -> None:
    s = evicted()
    batch = loading(s)
    s.scheduler.cancel(2)
    s.check()
    assert s.scheduler.stats.used_pages == 5
    (delta,) = s.end(batch, moves=())
    assert delta.finish_reason is FinishReason.CANCELLED
    assert s.scheduler.stats.used_pages == 5, "the step is back, and the loads are not"
    s.end(s.form())
    assert s.scheduler.stats.used_pages == 0
    assert s.scheduler.stats.cached_pages >= 4, "what was loaded can be found again"
    assert not s.scheduler.has_work


def test_two_requests_load_the_same_pages_without_waiting_for_each_other() -> None:
    s = evicted(num_pages=14)
    for id in (4, 5):
        s.add(id, [*FIRST, id])
    batch = s.form()
    assert len(batch.admitted) == 2
    assert sum(t.move is Move.LOAD for t in batch.transfers) == 8
    s.end(batch)
    s.finish()
    s.moved = []
    s.add(6, [*FIRST, 6])
    assert s.form().prefills[0].start == 8, "the device has them now, once"
    assert s.count(Move.LOAD) == 0


def test_the_loads_on_their_way_are_bounded_and_go_to_the_first_request_first() -> None:
    s = evicted(num_pages=14, tier_limits={"load_pages": 3})
    for id in (4, 5):
        s.add(id, [*FIRST, id])
    first = s.form()
    pages = [page for slot, index, page in first.page_table if slot == 0 and index < 4]
    assert [t.page for t in first.transfers] == pages[:0:-1]
    s.end(first)
    second = s.form()
    assert len(second.transfers) == 3
    assert second.transfers[0].page == pages[0]
    assert not second.prefills
    s.end(second)
    assert [p.start for p in s.form().prefills] == [8], "the first does not wait for the second"


def test_what_has_left_host_memory_meanwhile_is_computed() -> None:
    """The chain is looked up, its loads wait for their turn, and a store takes the slot of the second page."""
    s = evicted(tier_limits={"load_pages": 2})
    s.add(2, [*FIRST, 1])
    batch = s.form()
    assert len(batch.transfers) == 2
    s.host.abandon(contents(FIRST)[1])
    s.end(batch)
    s.end(s.form())
    batch = s.form()
    assert [(p.start, p.token_ids) for p in batch.prefills] == [(2, [*FIRST[2:], 1])], "its successors are of no use"
    s.end(batch)
    s.finish()


@pytest.mark.parametrize("fails", [False, True])
def test_what_only_the_disk_has_goes_through_host_memory_or_is_computed(fails: bool) -> None:
    s = evicted(disk=LossyDisk(20))
    chain = leave_to_disk(s)
    s.add(2, [*FIRST, 1])
    batch = s.form()
    assert [(t.move, t.content) for t in batch.transfers] == [(Move.READ, content) for content in reversed(chain)]
    assert s.end(batch, moves=(), failed=(Move.READ,) if fails else ()) == []
    if fails:
        assert [p.start for p in s.form().prefills] == [0]
        return
    s.end(s.form())
    batch = s.form()
    assert [t.move for t in batch.transfers] == [Move.LOAD] * 4
    s.end(batch)
    (delta,) = s.end(s.form())
    assert delta.cached_tokens == 8


def test_a_request_that_has_to_wait_has_its_pages_brought_from_the_disk_meanwhile() -> None:
    s = evicted(disk=LossyDisk(20), max_running=1)
    chain = leave_to_disk(s)
    s.add(3, [50], max_tokens=6)
    s.step()
    s.add(2, [*FIRST, 1])
    batch = s.form()
    assert [(t.move, t.content) for t in batch.transfers if t.move is Move.READ] == [(Move.READ, c) for c in chain]
    s.end(batch)
    s.finish()
    assert s.count(Move.READ) == 4
    assert s.count(Move.LOAD) == 4


def test_a_disk_that_does_not_answer_holds_up_nobody() -> None:
    s = evicted(disk=LossyDisk(20))
    chain = leave_to_disk(s)
    s.lower.rates.prefill.measured(1, 1.0)
    s.add(2, [*FIRST, 1])
    batch = s.form()
    assert [t.move for t in batch.transfers] == [Move.READ] * 4
    for s.now_s in (1.0, 15.0):
        s.end(batch, moves=())
        batch = s.form()
        assert not batch.prefills, "computing takes eight seconds"
    s.now_s = 17.0
    s.end(batch, moves=())
    s.end(s.form(), moves=())
    batch = s.form()
    assert [p.start for p in batch.prefills] == [0]
    (delta,) = s.end(batch)  # and now the disk answers
    assert delta.cached_tokens == 0
    s.finish()
    assert s.count(Move.LOAD) == 0
    assert all(s.host.lookup(content) is not None for content in chain)
