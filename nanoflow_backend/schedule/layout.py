"""Layout says where the rows of a batch lie when its decodes are dealt out to a schedule's groups.

T tokens of the batch. Rows are listed as Batch lists them: all decodes, then the prompts' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.schedule.plan import Group


@dataclass(frozen=True)
class Layout:
    """A permutation of the listed rows and its inverse."""

    listed: NDArray[np.int32]  # int32 [T]: which listed row lies here
    place: NDArray[np.int32]  # int32 [T]: where a listed row lies


def deal(decodes: int, tokens: int, groups: Sequence[Group]) -> Layout | None:
    """Each group's share of the `decodes`, then prompts' tokens up to its boundary; None: rows lie as listed.

    A share that finds no room, or no prompt beside it, moves to the groups that come next or, at the end, before.
    Boundaries beyond `tokens` are of padding.
    """
    if not groups or decodes in (0, tokens):
        return None
    runs: list[NDArray[np.int64]] = []
    begin, dealt, share = 0, 0, 0.0
    for group in groups:
        stop, share = min(group.stop, tokens), share + group.decodes
        # There are tokens - decodes rows of prompts to fill places with, and stop - begin places.
        until = min(max(round(share * decodes), dealt, stop - (tokens - decodes)), decodes, dealt + stop - begin)
        prompts = decodes + begin - dealt
        runs += [np.arange(dealt, until), np.arange(prompts, prompts + stop - begin - (until - dealt))]
        begin, dealt = stop, until
    listed = np.concatenate(runs, dtype=np.int32)
    place = np.empty_like(listed)
    place[listed] = np.arange(tokens, dtype=np.int32)
    return Layout(listed, place)
