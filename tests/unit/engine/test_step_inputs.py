"""The arrays of a step, against a list of its rows made one by one."""

import random
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest

from nanoflow_backend.engine.step_inputs import StepInputs
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.schedule.plan import Group
from nanoflow_backend.scheduler.batch import Admission, Batch, Prefill


class Row(NamedTuple):
    slot: int
    position: int
    token_id: int | None  # None: the device has it
    sampled: bool


def random_batch(rng: random.Random) -> Batch:
    slots = rng.sample(range(50), rng.randint(1, 12))
    cut = rng.randint(0, len(slots))
    prefills = [
        Prefill(slot, rng.randint(0, 90), [rng.randrange(1000) for _ in range(rng.randint(1, 9))], rng.random() < 0.5)
        for slot in slots[cut:]
    ]
    table = [(slot, rng.randrange(20), rng.randrange(200)) for slot in rng.sample(slots, rng.randint(0, len(slots)))]
    admitted = [Admission(slots[0], 1, SamplingParams(seed=1))] if rng.random() < 0.3 else []
    return Batch(7, slots[:cut], [rng.randint(1, 99) for _ in range(cut)], prefills, table, admitted)


def rows_of(batch: Batch) -> list[Row]:
    decodes = zip(batch.decode_slots, batch.decode_positions, strict=True)
    rows = [Row(slot, position, None, True) for slot, position in decodes]
    for chunk in batch.prefills:
        for offset, token_id in enumerate(chunk.token_ids):
            ends = chunk.sample and offset == len(chunk.token_ids) - 1
            rows.append(Row(chunk.slot, chunk.start + offset, token_id, ends))
    return rows


def random_groups(rng: random.Random, tokens: int) -> tuple[Group, ...]:
    stops = sorted({rng.randint(1, tokens) for _ in range(rng.randint(0, 3))} | {tokens + rng.randint(0, 8)})
    weights = [rng.random() + 0.01 for _ in stops]
    return tuple(Group(stop, weight / sum(weights)) for stop, weight in zip(stops, weights, strict=True))


@pytest.mark.parametrize("dealt", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_arrays_say_what_the_rows_of_the_batch_say(seed: int, dealt: bool) -> None:
    rng = random.Random(seed)
    batch = random_batch(rng)
    rows = rows_of(batch)
    inputs = StepInputs.pack(batch, random_groups(rng, len(rows)) if dealt else ())
    assert inputs.slots.tolist() == [row.slot for row in rows]
    assert inputs.positions.tolist() == [row.position for row in rows]
    assert inputs.prompt_ids.tolist() == [row.token_id for row in rows[len(batch.decode_slots) :]]
    assert inputs.page_table.T.tolist() == [list(entry) for entry in batch.page_table]
    lie = [rows[listed] for listed in inputs.layout.listed] if inputs.layout else rows
    assert sorted(lie, key=rows.index) == rows, "each row lies somewhere"
    sampled = [row for row in rows if row.sampled]
    assert [lie[place] for place in inputs.sampled_rows] == sampled
    assert inputs.sampled_slots.tolist() == [row.slot for row in sampled] == batch.sampled_slots
    assert inputs.sampled_positions.tolist() == [row.position for row in sampled]
    for array in vars(inputs).values():
        assert not isinstance(array, np.ndarray) or array.dtype == np.int32


def test_some_batches_are_dealt_out_and_some_are_not() -> None:
    """The test above would be none without both."""
    laid_out = []
    for seed in range(60):
        rng = random.Random(seed)
        batch = random_batch(rng)
        laid_out.append(StepInputs.pack(batch, random_groups(rng, batch.tokens)).layout is not None)
    assert 20 < sum(laid_out) < 60


def test_a_batch_of_decodes_alone_and_one_of_prompts_alone() -> None:
    decodes = StepInputs.pack(Batch(0, [3, 1], [9, 4], [], [], []))
    assert (decodes.prompt_ids.shape, decodes.page_table.shape) == ((0,), (3, 0))
    assert decodes.sampled_rows.tolist() == [0, 1]
    prompt = StepInputs.pack(Batch(0, [], [], [Prefill(2, 5, [8, 9], sample=False)], [(2, 0, 6)], []))
    assert (prompt.sampled_rows.shape, prompt.positions.tolist()) == ((0,), [5, 6])


def test_packing_needs_no_torch() -> None:
    code = "import sys, nanoflow_backend.engine.step_inputs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
