"""Sliding windows: the logits are those of transformers, whatever cuts a request, and its chunks, in parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.models.cases import LENGTHS, TOKENS, Case
from support.models.shapes import config

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.engine import LLM, SamplingParams
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


SOME = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
QWEN = {"use_sliding_window": True, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("architecture", "fields", "full"),
    [
        ("qwen2", QWEN, (0, 1)),
        ("qwen3", QWEN, (0, 1)),
        ("qwen3", QWEN | {"layer_types": SOME}, (0, 3)),
        ("ministral", {"layer_types": SOME}, (0, 3)),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, (0, 2)),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0], "layer_types": SOME}, (0, 3)),  # each of four kinds
    ],
)
def test_windows_of_some_layers(architecture: str, fields: dict[str, Any], full: Sequence[int], tmp_path: Path) -> None:
    case = Case(tmp_path, architecture, LENGTHS, sliding_window=5, num_hidden_layers=4, **fields)
    graphs = case.model.in_order
    assert [graph["attention"].attributes.get("window", 0) for graph in graphs] == [
        5 * (i not in full) for i in range(4)
    ]
    for schedule in (sequential(case.model.layer, TOKENS), nano_batched(case.model.layer, TOKENS, 3)):
        case.check(case.program(schedule, checked=True))


@pytest.mark.parametrize(("architecture", "fields"), [("qwen3", QWEN), ("smollm3", {"no_rope_layers": [1, 0, 1]})])
def test_tokens_of_long_requests_are_those_of_generate(
    architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Prompts and answers several times as long as the window, in chunks, the second one behind a cached prefix."""
    model = make(architecture, **fields | {"sliding_window": 9, "num_hidden_layers": 3})
    save(model, tmp_path)
    rng = Random(3)
    first = [rng.randrange(331) for _ in range(60)]
    llm = LLM.from_pretrained(tmp_path, schedule="nano-batched-3", chunk_tokens=13, page_tokens=4, kv_cache_tokens=256)
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for prompt in (first, [*first[:50], 5, 7]):
        (ours,) = llm.generate([prompt], greedy)
        assert (ours.num_cached_tokens > 0) == (prompt != first)
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert ours.token_ids == theirs[0, len(prompt) :].tolist()


def test_a_window_that_no_request_outgrows_is_none() -> None:
    shape = config("llama", max_model_tokens=256)
    windows = [
        build(replace(shape, sliding_window=window)).layer["attention"].attributes.get("window", 0)
        for window in (0, 1, 255, 256, 1000)
    ]
    assert windows == [0, 1, 255, 0, 0]
