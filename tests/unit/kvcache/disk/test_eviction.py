"""What goes first of a full disk."""

from __future__ import annotations

import random

from nanoflow_backend.kvcache.disk.eviction import StoredPage, eviction_order


def page(key: str, used_ns: int, parent: str = "") -> StoredPage:
    return StoredPage(used_ns, 1, f"name of {key}", key, parent)


def keys(*pages: StoredPage) -> list[str]:
    return [page.key for page in eviction_order(pages)]


def test_pages_that_nothing_follows_go_by_their_last_use() -> None:
    assert keys(page("a", 3), page("b", 1), page("c", 2)) == ["b", "c", "a"]


def test_a_chain_goes_from_its_end_though_its_front_is_older() -> None:
    """It was written front first."""
    assert keys(page("a", 1), page("b", 2, "a"), page("c", 3, "b"), page("d", 9)) == ["c", "b", "a", "d"]


def test_a_page_of_which_the_front_is_gone_goes_by_its_last_use() -> None:
    assert keys(page("b", 5, "gone"), page("c", 4)) == ["c", "b"]


def test_names_in_a_circle_go_last_and_go() -> None:
    assert keys(page("a", 1, "b"), page("b", 2, "a"), page("c", 3)) == ["c", "a", "b"]
    assert keys(page("a", 1, "a")) == ["a"]


def test_two_files_of_one_key_both_go() -> None:
    twice = [page("a", 1), page("a", 2)._replace(name="another")]
    assert sorted(p.name for p in eviction_order(twice)) == ["another", "name of a"]


def test_random_forests_lose_every_page_once_and_the_oldest_leaf_first() -> None:
    draw = random.Random(7)
    for _ in range(50):
        pages: list[StoredPage] = []
        for number in range(draw.randrange(30)):
            parent = draw.choice(pages).key if pages and draw.random() < 0.7 else ""
            pages.append(page(str(number), draw.randrange(20), parent))
        left = list(pages)
        for gone in eviction_order(pages):
            followed = {other.parent for other in left}
            assert gone == min(other for other in left if other.key not in followed)
            left.remove(gone)
        assert not left
