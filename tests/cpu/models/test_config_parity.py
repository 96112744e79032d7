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
from transformers import Phi3Config

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.models.families.phi3 import PHI3
from nanoflow_backend.models.hugging_face import from_hf

State = dict[str, torch.Tensor]
PROMPT = [(7 * i * i + 3 * i) % 331 for i in range(40)]
TOLERANCE = 1e-4  # of a log-probability, in fp32


def worst_difference(folder: Path, **options: Any) -> float:
    """Between transformers' log-probabilities of PROMPT's tokens and the engine's."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    llm = LLM.from_pretrained(folder, kv_cache_tokens=512, **options)
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
        ("qwen3", ["rope_parameters", "rms_norm_eps", "use_sliding_window", "layer_types", "tie_word_embeddings"]),
        ("qwen3_moe", ["rope_parameters", "norm_topk_prob", "decoder_sparse_step", "sliding_window"]),
        ("mistral", ["rope_parameters", "rms_norm_eps", "head_dim"]),
        ("phi3", ["rope_parameters", "rms_norm_eps", "head_dim", "num_key_value_heads"]),
        ("glm", ["rope_parameters", "rms_norm_eps", "attention_bias", "tie_word_embeddings"]),
        ("ernie4_5", ["rope_parameters", "rms_norm_eps", "tie_word_embeddings", "use_bias"]),
        ("helium", ["rope_parameters", "rms_norm_eps", "tie_word_embeddings"]),
        ("ministral", ["rope_parameters", "rms_norm_eps", "layer_types"]),
        ("smollm3", ["rope_parameters", "rms_norm_eps", "no_rope_layers", "layer_types"]),
        ("seed_oss", ["rope_parameters", "rms_norm_eps", "attention_bias", "tie_word_embeddings"]),
    ],
)
def test_keys_left_out(architecture: str, keys: list[str], tmp_path: Path) -> None:
    options = {"kv_heads": 8} if "num_key_value_heads" in keys else {}
    options |= {"head_dim": 8} if "head_dim" in keys else {}
    save(make(architecture, **options), tmp_path)
    edit_config(tmp_path, lambda config: [config.pop(key) for key in keys])
    assert worst_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "qwen3_moe"])
def test_biases_of_all_four_projections_of_attention(architecture: str, tmp_path: Path) -> None:
    save(make(architecture, attention_bias=True), tmp_path)
    assert worst_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize(
    ("bias", "out_bias", "ranks"),
    [(False, False, 1), (False, True, 1), (True, False, 1), (True, True, 1), (True, True, 2)],
)
def test_biases_of_seed_oss(bias: bool, out_bias: bool, ranks: int, tmp_path: Path) -> None:
    save(make("seed_oss", attention_bias=bias, attention_out_bias=out_bias), tmp_path)
    assert worst_difference(tmp_path, tensor_parallel=ranks) < TOLERANCE


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
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "factor": 4.0},  # of max_position_embeddings
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 8,
            "beta_slow": 2,
            "mscale": 1.0,
            "mscale_all_dim": 0.4,
            "truncate": False,
        },
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.7, "mscale": 1.0, "mscale_all_dim": 0.4},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 2.0},  # alone it has no effect
        {"rope_type": "dynamic", "factor": 4.0},  # of what is longer than max_position_embeddings: nothing is
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


def test_yarn_stretches_the_context(tmp_path: Path) -> None:
    """Beyond max_position_embeddings, which is what the model was trained on first."""
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    save(make("qwen3", max_position_embeddings=16, rope_parameters=yarn), tmp_path)
    assert worst_difference(tmp_path) < TOLERANCE


def test_what_is_not_rotated_is_not_scaled_by_yarn(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    save(make("smollm3", max_position_embeddings=16, rope_parameters=yarn, use_sliding_window=False), tmp_path)
    assert worst_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize("share", [0.5, 0.75, 0.7])  # of 16 dimensions: 8, 12, and 11.2, which is 11 and refused
def test_rotation_of_a_part_of_each_head(share: float, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    if share == 0.7:
        config = Phi3Config(hidden_size=128, num_attention_heads=8, rope_parameters=rope, architectures=[PHI3.hf_class])
        with pytest.raises(ConfigError, match=r"partial_rotary_factor 0.7: expected an even number .* \(16\), got 11"):
            from_hf(config.to_dict(), {})
        return
    save(make("phi3", rope_parameters=rope), tmp_path)
    assert worst_difference(tmp_path) < TOLERANCE


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.3, 1.7, 2.5, 3.0, 4.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 9.0, 20.0, 31.0, 64.0],
}


@pytest.mark.parametrize("first_context", [16, 64])  # shorter than PROMPT, and longer
@pytest.mark.parametrize(
    "scaling",
    [
        LONGROPE,
        {**LONGROPE, "attention_factor": 1.3, "factor": 4},
        {**LONGROPE, "factor": 0.5},
        {
            **LONGROPE, "partial_rotary_factor": 0.75,
            "short_factor": LONGROPE["short_factor"][:6], "long_factor": LONGROPE["long_factor"][:6],
        },
    ],
)  # fmt: skip
def test_longrope_of_requests_on_one_side_of_the_first_context(
    scaling: dict[str, Any], first_context: int, tmp_path: Path
) -> None:
    save(make("phi3", heads=4, rope_parameters=scaling, original_max_position_embeddings=first_context), tmp_path)
    limit = {"max_model_tokens": 512} if first_context < len(PROMPT) else {}
    assert worst_difference(tmp_path, **limit) < TOLERANCE


@pytest.mark.parametrize("kind", [{"type": "longrope"}, {"type": "su", "original_max_position_embeddings": 64}])
def test_longrope_as_phi3_spells_it(kind: dict[str, Any], tmp_path: Path) -> None:
    save(make("phi3", heads=4, rope_parameters=LONGROPE, original_max_position_embeddings=64), tmp_path)
    scaling = {**kind, **{name: LONGROPE[name] for name in ("short_factor", "long_factor")}}
    spelled = {"rope_parameters": None, "rope_scaling": scaling, "rope_theta": 10000.0}
    edit_config(tmp_path, lambda config: config.update(spelled))
    assert worst_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize("first_context", [30, 128])
def test_tokens_of_longrope_are_those_of_generate(first_context: int, tmp_path: Path) -> None:
    """Of requests longer than the first context from their prompts on, and of such that never are."""
    model = make("phi3", heads=4, rope_parameters=LONGROPE, original_max_position_embeddings=first_context)
    save(model, tmp_path)
    ids = torch.tensor([PROMPT])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    limit = {"max_model_tokens": 512} if first_context < len(PROMPT) else {}
    llm = LLM.from_pretrained(tmp_path, kv_cache_tokens=512, chunk_tokens=13, dense_batch_tokens=13, **limit)
    try:
        (ours,) = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=24))
        assert ours.token_ids == theirs[0, len(PROMPT) :].tolist()
        longest = 512 if limit else first_context
        assert llm.engine.max_model_tokens == longest
    finally:
        llm.close()


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "phi3"])
@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("shard", ["60KB", "1GB"])
def test_experts_by_themselves_and_in_one_tensor(architecture: str, original: bool, shard: str, tmp_path: Path) -> None:
    """As save_pretrained writes them, and as transformers 5 has them in memory; Phi-3's fused tensors in both."""
    save(make(architecture), tmp_path, save_original_format=original, max_shard_size=shard)
    assert worst_difference(tmp_path) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "other"), [("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")]
)
def test_either_name_of_the_number_of_experts(name: str, other: str, tmp_path: Path) -> None:
    save(make("qwen3_moe"), tmp_path)
    edit_config(tmp_path, lambda config: config.update({name: 8}) or config.pop(other, None))
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
