"""Where the rows of a batch lie in groups."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models.shapes import config

from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Group
from nanoflow_backend.schedule.presets import overlapped

LAYER = build(config("llama")).layer


def held(decodes: int, tokens: int, groups: tuple[Group, ...]) -> list[int]:
    """The decodes of each group, once every row is there exactly once: decodes first, all else as listed."""
    layout = deal(decodes, tokens, groups)
    assert layout is not None
    assert sorted(layout.listed) == list(range(tokens))
    assert layout.listed[layout.place].tolist() == list(range(tokens))
    assert layout.listed.dtype == layout.place.dtype == np.int32
    for kind in (layout.listed < decodes, layout.listed >= decodes):
        assert (np.diff(layout.listed[kind]) == 1).all()
    counts = []
    for start, stop in pairwise([0, *(min(group.stop, tokens) for group in groups)]):
        is_decode = layout.listed[start:stop] < decodes
        counts.append(int(is_decode.sum()))
        assert is_decode[: counts[-1]].all()
    return counts


@pytest.mark.parametrize(
    ("decodes", "tokens", "shares", "expected"),
    [
        (10, 100, [(50, 0.5), (100, 0.5)], [5, 5]),
        (9, 100, [(20, 0.0), (60, 0.3), (100, 0.7)], [0, 3, 6]),
        (90, 100, [(20, 0.5), (100, 0.5)], [20, 70]),  # the first has no room for its share
        (90, 100, [(80, 0.5), (100, 0.5)], [70, 20]),  # the last has none, and there is too little prompt
        (50, 70, [(60, 0.1), (90, 0.8), (128, 0.1)], [40, 10, 0]),  # padding, and a group of nothing else
        (1, 2, [(1, 0.2), (2, 0.8)], [0, 1]),
    ],
)
def test_decodes_are_dealt_by_share_and_room(
    decodes: int, tokens: int, shares: list[tuple[int, float]], expected: list[int]
) -> None:
    assert held(decodes, tokens, tuple(Group(*share) for share in shares)) == expected


def test_rows_lie_as_listed_where_there_is_nothing_to_deal() -> None:
    groups = (Group(4, 0.5), Group(8, 0.5))
    assert deal(3, 8, ()) is None
    assert deal(0, 8, groups) is None
    assert deal(8, 8, groups) is None


@given(st.integers(2, 300), st.integers(0, 40), st.floats(0, 1), st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_row_lies_in_one_place(tokens: int, padding: int, share: float, data: st.DataObject) -> None:
    decodes = data.draw(st.integers(1, tokens - 1))
    stop = data.draw(st.integers(1, 511))
    groups = overlapped(LAYER, 512, stop, share, 40, 132).fit_groups(tokens + padding)
    first, _ = held(decodes, tokens, groups)
    room = min(groups[0].stop, tokens)
    assert first == max(min(round(share * decodes), room), room - (tokens - decodes), 0)
