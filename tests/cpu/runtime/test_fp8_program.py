"""A model in FP8 on the CPU program computes what it should, under every schedule and however prompts are cut."""

from __future__ import annotations

import random

import pytest
import torch
from nanoflow_kernels import reference
from support.models.batches import Requests, decode_kv_tokens, forward
from support.models.cases import BATCHES, LENGTHS, TOKENS
from support.models.fp8_cases import CASES
from support.models.fp8_model import Fp8Forward, made_weights
from support.schedule.schedules import random_schedule

from benchmarks.accuracy.relative_rms import relative_rms
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_an_independent_computation(case: str) -> None:
    """Where a value is rounded to the other of two neighbours of e4m3, it and all that attends to it differ by some
    1e-2: such rows are some of them. Any other fault would be in all."""
    shape, rng = CASES[case], random.Random(3)
    model, requests = build(shape), Requests(shape, LENGTHS)
    weights = made_weights(model, seed=1)
    expected = [Fp8Forward(shape, weights).logits(ids) for ids in requests.ids]
    precision = Precision("float32", "float32", FP8 if shape.scaled_kv else "float32")
    dtype = getattr(torch, precision.kv)
    for schedule in (sequential(model.layer, TOKENS), *(random_schedule(model.layer, TOKENS, rng) for _ in range(1))):
        validate(schedule, model.layer, shape.num_layers)
        pages = KvPages.allocate(shape, requests.num_pages, requests.page_tokens, dtype, poison=True)
        binding = Binding(
            model, [schedule], weights, pages, OneRank(), reference, max_tokens=TOKENS, precision=precision
        )
        program, errors = CpuProgram(binding, checked=True), []
        for batch in BATCHES:
            forward(program, requests.inputs(batch), decode_kv_tokens(batch))
            rows = requests.rows(expected, batch)
            actual = program.head(torch.arange(len(rows)))
            errors += [relative_rms(a, e) for a, e in zip(actual, rows, strict=True)]
        assert sorted(errors)[int(0.3 * len(errors))] < 1e-5, schedule
        assert max(errors) < 0.3, schedule
