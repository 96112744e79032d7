"""Pages go to host memory beside later steps: which, when, and what is left behind."""

from __future__ import annotations

from itertools import pairwise

from support.scheduler.lossy_disk import LossyDisk
from support.scheduler.tiered import FIRST, SECOND, TieredScheduler, contents

from nanoflow_backend.kvcache.tier import FIRST as NO_PARENT
from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.scheduler.tiers.store_queue import StoreQueue, Waiting


def test_a_page_is_stored_when_the_step_that_fills_it_has_come_back() -> None:
    s = TieredScheduler()
    s.add(0, FIRST, max_tokens=4)
    first = s.form()
    assert first.transfers == []
    second = s.form()
    assert second.transfers == [], "the first is still on its way"
    s.end(first)
    third = s.form()
    pages = [page for _, index, page in first.page_table if index < 4]
    assert [(t.move, t.page) for t in third.transfers] == [(Move.STORE, page) for page in pages]
    assert third.returned == first.step
    assert s.host.lookup(contents(FIRST)[0]) is None, "it is on its way"
    s.end(second)
    assert [s.host.lookup(content) for content in contents(FIRST)] == [t.slot for t in third.transfers]
    s.end(third)
    s.finish()
    assert s.count(Move.STORE) == 6, "and the pages that its answer filled"


def test_the_device_does_not_give_away_a_page_that_is_being_stored() -> None:
    s = TieredScheduler()
    s.add(0, FIRST)
    s.step()
    batch = s.form()
    stored = {t.page for t in batch.transfers}
    assert len(stored) == 4
    s.end(batch, moves=())
    s.add(1, SECOND)  # wants every page
    waiting = s.form()
    assert not waiting.admitted
    s.end(waiting)
    batch = s.form()
    assert stored < {page for _, _, page in batch.page_table}
    s.end(batch)
    s.finish()


def test_when_the_bound_is_below_what_steps_fill_whole_chains_lose_their_ends_and_the_rest_is_found() -> None:
    """Eight requests, two at a time, that fill five pages each in three steps, at one store a step."""
    s = TieredScheduler(num_pages=12, host_slots=100, tier_limits={"store_pages": 1})
    prompts = [[100 * i + j for j in range(9)] for i in range(1, 9)]
    for id, prompt in enumerate(prompts):
        s.add(id, prompt, max_tokens=3)
    s.finish()
    lower = s.lower.stats
    dropped = lower.dropped_pages
    assert s.count(Move.STORE) + sum(dropped.values()) == 5 * len(prompts)
    assert 10 <= sum(dropped.values()) == dropped["left_device"] <= 30
    for prompt in prompts:
        kept = [s.host.lookup(content) is not None for content in contents(prompt)]
        assert all(a or not b for a, b in pairwise(kept)), "what is kept can be found: its predecessors are, too"


def test_what_was_seen_once_is_not_kept_where_it_has_to_be_seen_twice() -> None:
    s = TieredScheduler(num_pages=20, tier_limits={"keep": "seen_twice"})
    s.add(0, FIRST)
    s.finish()
    assert s.count(Move.STORE) == 0
    s.add(1, [*FIRST, 1, 2, 3])
    s.finish()
    assert [s.host.knows(content) for content in contents([*FIRST, 1, 2, 3])] == [True] * 4 + [False] * 2


def test_content_that_leaves_host_memory_is_stored_again_when_it_is_asked_for() -> None:
    s = TieredScheduler(num_pages=20)
    s.add(0, FIRST)
    s.finish()
    for content in reversed(contents(FIRST)):
        s.host.abandon(content)
    s.add(1, FIRST)
    s.finish()
    assert all(s.host.lookup(content) is not None for content in contents(FIRST))


def test_what_is_stored_goes_on_to_the_disk_with_the_name_of_its_predecessor() -> None:
    s = TieredScheduler(disk=LossyDisk(100), tier_limits={"disk_moves": 2})
    s.add(0, FIRST)
    s.finish()
    writes = [t for t in s.moved if t.move is Move.WRITE]
    chain = contents(FIRST)
    assert [(t.content, t.parent) for t in writes] == list(zip(chain, [NO_PARENT, *chain], strict=False))
    assert [t.slot for t in writes] == [s.host.lookup(content) for content in chain]


def test_the_work_of_tiers_ends_and_leaves_nothing_held() -> None:
    s = TieredScheduler(disk=LossyDisk(100), tier_limits={"store_pages": 1, "disk_moves": 1})
    s.add(0, FIRST)
    deltas = s.step()
    assert deltas[0].finish_reason
    assert s.scheduler.has_work, "its pages are not stored yet"
    s.finish()
    stats = s.scheduler.stats
    assert (stats.used_pages, stats.tiers.moved_pages) == (0, {"store": 4, "write": 4, "load": 0, "read": 0})
    assert not s.transfers


def taken(queue: StoreQueue, returned_step: int) -> bytes | None:
    waiting = queue.next(returned_step)
    if waiting is not None:
        queue.remove(waiting.content)
    return waiting and waiting.content


def test_a_queue_waits_for_the_step_that_fills_content_last() -> None:
    queue = StoreQueue("all", 10)
    queue.offer(Waiting(b"a", None, 1))
    queue.offer(Waiting(b"b", b"a", 2))
    queue.offer(Waiting(b"a", None, 3))
    assert taken(queue, 2) is None, "a is in another page by now, and before b"
    assert [taken(queue, 3) for _ in range(3)] == [b"a", b"b", None]
    assert len(queue) == 0


def test_urgent_content_goes_first_and_only_once() -> None:
    queue = StoreQueue("seen_twice", 10)
    for content in (b"a", b"b", b"a", b"b"):
        queue.offer(Waiting(content, None, 1))
    for content in (b"c", b"b"):
        queue.offer(Waiting(content, None, 1, urgent=True))
    assert [taken(queue, 1) for _ in range(4)] == [b"c", b"b", b"a", None]


def test_only_so_many_first_sights_are_remembered() -> None:
    queue = StoreQueue("seen_twice", 2)
    for content in (b"a", b"b", b"c", b"a", b"c"):
        queue.offer(Waiting(content, None, 1))
    assert [taken(queue, 1) for _ in range(2)] == [b"c", None], "a's first sight was forgotten"
