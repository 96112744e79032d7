"""dealt: which rows of a batch decode, once its decodes are dealt out to a schedule's groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Group
from nanoflow_search.cost.work import Mix

Decodes = Callable[[int, int], float]  # how many of the rows start .. stop - 1 decode


def dealt(mix: Mix, groups: Sequence[Group]) -> Decodes:
    """As the engine lays out a batch of `mix`; without groups, all decodes come first."""
    decodes = round(mix.decode_tokens)
    layout = deal(decodes, round(mix.tokens), groups)
    if layout is None:
        return lambda start, stop: max(0.0, min(stop, mix.decode_tokens) - start)
    before = np.concatenate(([0], np.cumsum(layout.listed < decodes)))
    return lambda start, stop: float(before[stop] - before[start])


def evenly(tokens: int, stops: Sequence[int]) -> tuple[Group, ...]:
    """Groups up to `stops` that each hold the batch's mean mix."""
    return tuple(Group(stop, (stop - start) / tokens) for start, stop in zip((0, *stops[:-1]), stops, strict=True))
