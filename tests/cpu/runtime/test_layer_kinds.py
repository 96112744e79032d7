"""A model whose layers are dense and of experts by turns computes what it should, under every schedule."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from nanoflow_kernels import reference
from support.comparison import assert_close
from support.models import layer_kinds
from support.models.batches import Requests, decode_kv_tokens, forward
from support.models.cases import BATCHES, LENGTHS, TOKENS
from support.models.layer_kinds import CONFIG, LAYERS, alternating
from support.schedule.schedules import plans, random_interleaving, random_schedule
from torch import Tensor

from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.models import weights
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.validate import validate

MODEL, REQUESTS = alternating(), Requests(CONFIG, LENGTHS)
NAMED = plans(MODEL.layer, TOKENS)


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    """Spread enough for every operation to matter."""
    made, rng = weights.dummy(MODEL, seed=1), torch.Generator().manual_seed(1)
    for name, tensor in made.items():
        if "frequencies" not in name:
            scale = 1.0 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
            tensor.normal_(1.0 if tensor.dim() == 1 else 0.0, scale, generator=rng)
    return made


def check(schedule: Schedule, values: dict[str, Tensor], rng: random.Random | None = None) -> None:
    validate(schedule, MODEL.layer, LAYERS)
    options: dict[str, Any] = {"max_tokens": TOKENS, "precision": FLOAT32}
    binding = Binding(MODEL, [schedule], values, REQUESTS.empty_pages(), OneRank(), reference, **options)
    program = CpuProgram(binding, checked=True)
    expected = [layer_kinds.logits(values, ids) for ids in REQUESTS.ids]
    for batch in BATCHES:
        order = random_interleaving(PartialOrder(schedule, LAYERS), rng) if rng else None
        forward(program, REQUESTS.inputs(batch), decode_kv_tokens(batch), order=order)
        rows = REQUESTS.rows(expected, batch)
        assert_close(f"logits of {batch}", program.head(torch.arange(len(rows))), rows.float())


@pytest.mark.parametrize("name", NAMED)
def test_logits_are_those_of_an_independent_computation(name: str, values: dict[str, Tensor]) -> None:
    check(NAMED[name], values)
    check(NAMED[name], values, random.Random(0))


def test_random_schedules_give_the_same_logits(values: dict[str, Tensor]) -> None:
    rng = random.Random(2)
    for _ in range(8):
        check(random_schedule(MODEL.layer, TOKENS, rng), values, rng)
