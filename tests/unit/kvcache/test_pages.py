import random

import pytest

from nanoflow_backend.kvcache.pages import OutOfPages, PagePool


class PlainPool:
    """The same rules, by search in lists: a page's owners, and the times at which cached pages were let go."""

    def __init__(self, num_pages: int) -> None:
        self.references = [0] * num_pages
        self.retained = [False] * num_pages
        self.let_go_at = [-1] * num_pages
        self.now = 0

    def idle(self, retained: bool) -> list[int]:
        return [p for p, n in enumerate(self.references) if n == 0 and self.retained[p] is retained]

    def release(self, page: int) -> None:
        self.references[page] -= 1
        self.now += 1
        self.let_go_at[page] = self.now

    def next_evicted(self) -> int | None:
        return None if self.idle(False) else min(self.idle(True), key=lambda p: self.let_go_at[p])


@pytest.mark.parametrize("seed", range(50))
def test_pool_agrees_with_a_plain_model(seed: int) -> None:
    rng = random.Random(seed)
    num_pages = rng.randint(1, 9)
    evicted: list[int] = []
    pool, plain = PagePool(num_pages, evicted.append), PlainPool(num_pages)
    for _ in range(400):
        held = [p for p, n in enumerate(plain.references) if n]
        action = rng.choice(("allocate", "release", "share", "retain"))
        if action == "allocate" and pool.available:
            expected = plain.next_evicted()
            (page,) = pool.allocate(1)
            if expected is None:
                assert not plain.retained[page], "a cached page was taken while one was free"
            else:
                assert page == expected
                assert evicted.pop() == page
                plain.retained[page] = False
            assert plain.references[page] == 0
            plain.references[page] = 1
        elif action == "release" and held:
            page = rng.choice(held)
            pool.release([page])
            plain.release(page)
        elif action == "share" and (known := held + plain.idle(True)):
            page = rng.choice(known)
            pool.share(page)
            plain.references[page] += 1
        elif action == "retain" and held:
            page = rng.choice(held)
            pool.retain(page)
            plain.retained[page] = True
        pool.check()
        assert not evicted
        assert pool.references == plain.references
        assert (pool.available, pool.cached) == (plain.references.count(0), len(plain.idle(True)))
        assert pool.used == num_pages - pool.available


def pool_of(num_pages: int) -> PagePool:
    return PagePool(num_pages, on_evict=lambda page: None)


def test_allocate_takes_all_or_nothing() -> None:
    pool = pool_of(3)
    with pytest.raises(OutOfPages, match="asked for 4 pages, 3 of 3 are available"):
        pool.allocate(4)
    assert pool.available == 3


def test_a_page_is_not_freed_twice() -> None:
    pool = pool_of(2)
    (page,) = pool.allocate(1)
    pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} was released more often"):
        pool.release([page])


def test_a_free_page_has_nothing_to_share_or_keep() -> None:
    pool = pool_of(2)
    with pytest.raises(ValueError, match="page 0 is free"):
        pool.share(0)
    with pytest.raises(ValueError, match="page 0 is not referenced"):
        pool.retain(0)


def test_of_pages_released_together_the_first_is_evicted_first() -> None:
    evicted: list[int] = []
    pool = PagePool(3, evicted.append)
    pages = pool.allocate(3)
    for page in pages:
        pool.retain(page)
    pool.release(reversed(pages))
    pool.allocate(2)
    assert evicted == [pages[2], pages[1]]


def test_check_finds_a_lost_page() -> None:
    pool = pool_of(3)
    pool.references[1] = 1
    with pytest.raises(AssertionError, match="in two places"):
        pool.check()
