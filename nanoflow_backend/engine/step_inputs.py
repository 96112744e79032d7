"""StepInputs holds what the device must be told of one step, as arrays of ints made from a Batch.

T tokens of the batch, D of them decodes, R rows that are sampled, E new entries of the page table. "Listed" is the
order in which Batch lists its rows: decodes first, then the chunks of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.schedule.layout import Layout, deal
from nanoflow_backend.schedule.plan import Group
from nanoflow_backend.scheduler.batch import Batch

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class StepInputs:
    """Arrays of one step, all int32 on the host. The worker sends them to the device in one copy."""

    slots: Ints  # [T], of each listed row
    positions: Ints  # [T], of each listed row in its request
    prompt_ids: Ints  # [T - D], token ids of the listed rows after the decodes, whose ids are on the device
    layout: Layout | None  # where the listed rows lie; None: they lie as they are listed
    sampled_rows: Ints  # [R], where the rows lie that are sampled: decodes, then the ends of prompts
    sampled_slots: Ints  # [R], their slots
    sampled_positions: Ints  # [R], their positions
    page_table: Ints  # [3, E]: slot, index and page of the entries that are new

    @classmethod
    def pack(cls, batch: Batch, groups: Sequence[Group] = ()) -> StepInputs:
        """The arrays of `batch`, whose rows are dealt out to `groups` of its plan (none: rows lie as listed)."""
        decodes = len(batch.decode_slots)
        slots, positions = list(batch.decode_slots), list(batch.decode_positions)
        prompt_ids: list[int] = []
        ends: list[int] = []  # listed rows that end the known tokens of their request
        for prefill in batch.prefills:
            count = len(prefill.token_ids)
            slots += [prefill.slot] * count
            positions += range(prefill.start, prefill.start + count)
            prompt_ids += prefill.token_ids
            if prefill.sample:
                ends.append(len(slots) - 1)
        listed = np.array([*range(decodes), *ends], np.int32)
        slot_of, position_of = np.array(slots, np.int32), np.array(positions, np.int32)
        layout = deal(decodes, len(slots), groups)
        return cls(
            slots=slot_of,
            positions=position_of,
            prompt_ids=np.array(prompt_ids, np.int32),
            layout=layout,
            sampled_rows=layout.place[listed] if layout else listed,
            sampled_slots=slot_of[listed],
            sampled_positions=position_of[listed],
            page_table=np.array(batch.page_table, np.int32).reshape(-1, 3).T,
        )
