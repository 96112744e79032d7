from array import array

from nanoflow_backend.kvcache.prefix import PrefixIndex


def published(index: PrefixIndex, token_ids: list[int], pages: list[int]) -> None:
    digests: list[bytes] = []
    index.extend(digests, array("i", token_ids), len(pages))
    for digest, page in zip(digests, pages, strict=True):
        index.publish(digest, page)


def found(index: PrefixIndex, token_ids: list[int]) -> list[int]:
    return index.lookup([], array("i", token_ids))


def test_the_longest_known_prefix_is_found() -> None:
    index = PrefixIndex(page_tokens=2)
    published(index, [1, 2, 3, 4, 5, 6], [10, 11, 12])
    assert found(index, [1, 2, 3, 4, 9, 9, 9]) == [10, 11]
    assert found(index, [1, 2, 3, 4, 5, 6, 7]) == [10, 11, 12]
    assert found(index, [9, 2, 3, 4, 5, 6, 7]) == []


def test_the_last_token_is_never_served() -> None:
    index = PrefixIndex(page_tokens=2)
    published(index, [1, 2, 3, 4], [10, 11])
    assert found(index, [1, 2, 3, 4, 5]) == [10, 11]
    assert found(index, [1, 2, 3, 4]) == [10]
    assert found(index, [1, 2]) == []


def test_equal_pages_after_different_parents_are_different() -> None:
    index = PrefixIndex(page_tokens=2)
    published(index, [1, 1, 7, 7], [10, 11])
    published(index, [2, 2, 7, 7], [12, 13])
    assert found(index, [1, 1, 7, 7, 0]) == [10, 11]
    assert found(index, [2, 2, 7, 7, 0]) == [12, 13]
    assert found(index, [7, 7, 7, 7, 0]) == []


def test_ids_are_hashed_whole() -> None:
    index = PrefixIndex(page_tokens=2)
    published(index, [1, 256], [10])
    assert found(index, [257, 0, 5]) == []
    assert found(index, [1, 0, 5]) == []


def test_the_first_holder_of_a_content_keeps_its_name() -> None:
    index = PrefixIndex(page_tokens=1)
    published(index, [5], [10])
    published(index, [5], [11])
    assert found(index, [5, 5]) == [10]
    assert not index.holds(11)
    index.check()


def test_a_forgotten_page_is_not_found_and_its_children_are_out_of_reach() -> None:
    index = PrefixIndex(page_tokens=1)
    published(index, [1, 2, 3], [10, 11, 12])
    index.forget(11)
    index.check()
    assert found(index, [1, 2, 3, 4]) == [10]
    published(index, [1, 2], [10, 20])
    assert found(index, [1, 2, 3, 4]) == [10, 20, 12]


def test_digests_are_computed_once() -> None:
    index = PrefixIndex(page_tokens=2)
    digests: list[bytes] = []
    index.lookup(digests, array("i", [1, 2, 3, 4, 5]))
    before = list(digests)
    index.extend(digests, array("i", [0, 0, 0, 0, 5, 6]), 3)  # what is there is not looked at again
    assert digests[:2] == before
    assert len(set(digests)) == 3
