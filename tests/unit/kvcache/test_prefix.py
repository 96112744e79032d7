"""PrefixIndex: names of pages."""

from __future__ import annotations

from array import array

from nanoflow_backend.kvcache.content_hash import extend_hashes
from nanoflow_backend.kvcache.prefix import PrefixIndex


def published(index: PrefixIndex, token_ids: list[int], pages: list[int], page_tokens: int = 1) -> None:
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", token_ids), len(pages), page_tokens)
    for content, page in zip(hashes, pages, strict=True):
        index.publish(content, page)


def found(index: PrefixIndex, token_ids: list[int], page_tokens: int = 1) -> list[int | None]:
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", token_ids), len(token_ids) // page_tokens, page_tokens)
    return [index.lookup(content) for content in hashes]


def test_pages_are_found_by_all_that_comes_up_to_their_end() -> None:
    index = PrefixIndex()
    published(index, [1, 2, 3, 4, 5, 6], [10, 11, 12], page_tokens=2)
    assert found(index, [1, 2, 3, 4, 9, 9], page_tokens=2) == [10, 11, None]
    assert found(index, [9, 2, 3, 4, 5, 6], page_tokens=2) == [None, None, None]


def test_equal_pages_after_different_parents_are_different() -> None:
    index = PrefixIndex()
    published(index, [1, 1, 7, 7], [10, 11], page_tokens=2)
    published(index, [2, 2, 7, 7], [12, 13], page_tokens=2)
    assert found(index, [1, 1, 7, 7], page_tokens=2) == [10, 11]
    assert found(index, [2, 2, 7, 7], page_tokens=2) == [12, 13]
    assert found(index, [7, 7, 7, 7], page_tokens=2) == [None, None]


def test_the_first_holder_of_a_content_keeps_its_name() -> None:
    index = PrefixIndex()
    published(index, [5], [10])
    published(index, [5], [11])
    assert found(index, [5]) == [10]
    assert not index.holds(11)
    index.check()


def test_a_forgotten_page_is_not_found_and_can_be_named_again() -> None:
    index = PrefixIndex()
    published(index, [1, 2, 3], [10, 11, 12])
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", [1, 2]), 2, 1)
    assert index.forget(11) == hashes[1]
    index.check()
    assert found(index, [1, 2, 3]) == [10, None, 12]
    published(index, [1, 2], [10, 20])
    assert found(index, [1, 2, 3]) == [10, 20, 12]
