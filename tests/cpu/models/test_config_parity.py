"""Folders whose config.json or tensors are not those that transformers itself saves: its log-probabilities are ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.engine import LLM, SamplingParams

State = dict[str, torch.Tensor]
PROMPT = [(7 * i * i + 3 * i) % 331 for i in range(40)]
TOLERANCE = 1e-4  # of a log-probability, in fp32


def worst_difference(folder: Path) -> float:
    """Between transformers' log-probabilities of PROMPT's tokens and the engine's."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    llm = LLM.from_pretrained(folder, kv_cache_tokens=512)
    try:
        (ours,) = llm.generate([PROMPT], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    finally:
        llm.close()
    tokens = ours.prompt_logprobs
    assert len(tokens) == len(PROMPT) - 1
    return max(abs(float(theirs[i, PROMPT[i + 1]]) - token.logprobs[0]) for i, token in enumerate(tokens))


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("llama", ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "hidden_act"]),
        ("qwen2", ["rope_parameters", "rms_norm_eps", "sliding_window", "use_sliding_window", "layer_types"]),
        ("mixtral", ["rope_parameters", "rms_norm_eps", "num_local_experts", "num_experts_per_tok", "sliding_window"]),
        ("mixtral", ["num_key_value_heads"]),
    ],
)
def test_keys_left_out(architecture: str, keys: list[str], tmp_path: Path) -> None:
    options = {"kv_heads": 8} if "num_key_value_heads" in keys else {}
    save(make(architecture, **options), tmp_path)
    edit_config(tmp_path, lambda config: [config.pop(key) for key in keys])
    assert worst_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
)
@pytest.mark.parametrize("beside", [None, "equal"])
def test_scalings_in_the_older_spelling(scaling: dict[str, Any], beside: str | None, tmp_path: Path) -> None:
    save(make("qwen2"), tmp_path)
    theta = scaling.get("rope_theta", 20000.0)
    new = None if beside is None else {"rope_type": "default", **scaling, "rope_theta": theta}
    if new is not None and "type" in new:
        new["rope_type"] = new.pop("type")
    edit_config(tmp_path, lambda config: config.update(rope_parameters=new, rope_scaling=scaling, rope_theta=theta))
    assert worst_difference(tmp_path) < TOLERANCE


def distinct(state: State) -> State:
    generator = torch.Generator().manual_seed(1)
    return state | {"lm_head.weight": torch.randn(331, 64, generator=generator) / 8}


def equal(state: State) -> State:
    return state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}


def swapped(state: State) -> State:
    state = equal(state)
    del state["model.embed_tokens.weight"]
    return state


@pytest.mark.parametrize("change", [distinct, equal, swapped])
def test_heads_of_tied_models(change: Callable[[State], State], tmp_path: Path) -> None:
    save(make("llama", tie_word_embeddings=True), tmp_path)
    save_file(change(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors", {"format": "pt"})
    assert worst_difference(tmp_path) < TOLERANCE
