"""PageEvents: what is told of pages that come and go."""

from __future__ import annotations

from array import array

from nanoflow_backend.kvcache.page_events import Cleared, Medium, PageEvents, Removed, Stored

GPU, CPU = Medium.DEVICE, Medium.HOST


def ids(*token_ids: int) -> array[int]:
    return array("i", token_ids)


def test_consecutive_pages_are_one_event() -> None:
    events = PageEvents()
    events.stored(b"a", None, ids(1, 2), GPU)
    events.stored(b"b", b"a", ids(3, 4), GPU)
    events.stored(b"c", b"x", ids(5, 6), GPU)
    events.removed(b"b", GPU)
    events.removed(b"a", GPU)
    assert events.take() == [
        Stored([b"a", b"b"], None, [ids(1, 2), ids(3, 4)], GPU),
        Stored([b"c"], b"x", [ids(5, 6)], GPU),
        Removed([b"b", b"a"], GPU),
    ]
    assert events.take() == []


def test_what_was_taken_does_not_grow() -> None:
    events = PageEvents()
    events.stored(b"a", None, ids(1), GPU)
    taken = events.take()
    events.stored(b"b", b"a", ids(2), GPU)
    assert taken == [Stored([b"a"], None, [ids(1)], GPU)]
    assert events.take() == [Stored([b"b"], b"a", [ids(2)], GPU)]


def test_a_lower_tier_is_told_of_with_the_tokens_that_the_device_knew() -> None:
    events = PageEvents()
    events.stored(b"a", None, ids(1, 2), GPU)
    events.stored(b"b", b"a", ids(3, 4), GPU)
    events.take()
    events.copied(b"b", CPU)
    events.removed(b"b", GPU)
    events.copied(b"b", GPU)  # loaded again
    events.removed(b"b", CPU)
    assert events.take() == [
        Stored([b"b"], b"a", [ids(3, 4)], CPU),
        Removed([b"b"], GPU),
        Stored([b"b"], b"a", [ids(3, 4)], GPU),
        Removed([b"b"], CPU),
    ]


def test_tokens_are_kept_no_longer_than_a_tier_has_the_page() -> None:
    events = PageEvents()
    events.stored(b"a", None, ids(1, 2), GPU)
    events.copied(b"a", CPU)
    events.removed(b"a", GPU)
    events.removed(b"a", CPU)
    events.take()
    events.copied(b"a", CPU)  # as from a disk that an earlier process wrote
    assert events.take() == [Stored([b"a"], None, [], CPU)]
    events.stored(b"b", b"a", ids(3, 4), CPU)  # no neighbour of one that nobody described
    assert events.take() == [Stored([b"b"], b"a", [ids(3, 4)], CPU)]


def test_tokens_are_kept_for_a_tier_that_had_the_page_before_anyone_said_what_it_holds() -> None:
    events = PageEvents()
    events.copied(b"a", CPU)
    events.stored(b"a", None, ids(1, 2), GPU)
    events.removed(b"a", CPU)
    events.take()
    events.copied(b"a", CPU)
    assert events.take() == [Stored([b"a"], None, [ids(1, 2)], CPU)]


def test_nothing_is_known_after_a_clear() -> None:
    events = PageEvents()
    events.stored(b"a", None, ids(1, 2), GPU)
    events.cleared()
    events.copied(b"a", CPU)
    assert events.take() == [Stored([b"a"], None, [ids(1, 2)], GPU), Cleared(), Stored([b"a"], None, [], CPU)]
