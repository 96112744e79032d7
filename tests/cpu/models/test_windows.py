"""Sliding windows: the logits are those of transformers, whatever cuts a request, and its chunks, in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from support.models.cases import LENGTHS, TOKENS, Case
from support.models.shapes import config

from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.presets import nano_batched, sequential


@pytest.mark.parametrize("architecture", ["mistral", "mixtral", "phi3", "qwen3_moe"])
def test_logits_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    """Pages of 4 tokens, requests of 9 to 19."""
    uses = {"use_sliding_window": True} if architecture == "qwen3_moe" else {}
    case = Case(tmp_path, architecture, LENGTHS, sliding_window=5, **uses)
    assert case.config.sliding_window == 5
    for schedule in (sequential(case.model.layer, TOKENS), nano_batched(case.model.layer, TOKENS, 3)):
        case.check(case.program(schedule, checked=True))


def test_a_window_that_no_request_outgrows_is_none() -> None:
    shape = config("llama", max_model_tokens=256)
    windows = [
        build(replace(shape, sliding_window=window)).layer["attention"].attributes.get("window", 0)
        for window in (0, 1, 255, 256, 1000)
    ]
    assert windows == [0, 1, 255, 0, 0]
