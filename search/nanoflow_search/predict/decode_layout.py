"""The decode layout says which rows of a batch decode, once the engine has dealt its decodes out to a plan's groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Group
from nanoflow_search.cost.workload import Mix

DecodeCount = Callable[[int, int], float]  # (start, stop) -> how many of the rows start .. stop - 1 decode


def count_decodes(mix: Mix, groups: Sequence[Group]) -> DecodeCount:
    """Return the function that counts the decodes of a range of rows in a batch of `mix`.

    Rows are laid out as the engine does it: in each group decodes come first, then prompts. Without groups the whole
    batch is one group.
    """
    decodes = round(mix.decode_tokens)
    layout = deal(decodes, round(mix.tokens), groups)
    if layout is None:
        return lambda start, stop: max(0.0, min(stop, mix.decode_tokens) - start)
    before = np.concatenate(([0], np.cumsum(layout.listed < decodes)))
    return lambda start, stop: float(before[stop] - before[start])


def even_groups(tokens: int, stops: Sequence[int]) -> tuple[Group, ...]:
    """Return groups that end at `stops` (ascending, the last is `tokens`) and each hold the batch's mean mix."""
    return tuple(Group(stop, (stop - start) / tokens) for start, stop in zip((0, *stops[:-1]), stops, strict=True))
