"""config.json in its old and new spellings, and what is said where it is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.models.published import LLAMA2, QWEN2

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig, RopeConfig
from nanoflow_backend.models.blocks.rotary import scale_frequencies
from nanoflow_backend.models.hugging_face import from_hf, read_model_config

LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = LLAMA2 | {
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA3_SCALING,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
DEEPSEEK_67B = LLAMA2 | {
    "hidden_size": 8192,
    "intermediate_size": 22016,
    "num_attention_heads": 64,
    "num_hidden_layers": 95,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
    "eos_token_id": 100001,
}
MIXTRAL = LLAMA2 | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
}
EXPECTED = {
    "llama2": (LLAMA2, {"head_dim": 128, "dtype": "float16", "eos_token_ids": (2,), "rope": RopeConfig()}),
    "llama31": (
        LLAMA31,
        {
            "num_kv_heads": 8,
            "max_model_tokens": 131072,
            "eos_token_ids": (128001, 128008, 128009),
            "rope": RopeConfig(
                theta=500000.0,
                scaling="llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_positions=8192,
            ),
        },
    ),
    "deepseek": (DEEPSEEK_67B, {"architecture": "llama", "num_layers": 95, "head_dim": 128, "num_kv_heads": 8}),
    "qwen2": (QWEN2, {"architecture": "qwen2", "qkv_bias": True, "head_dim": 64, "tie_word_embeddings": True}),
    "mixtral": (MIXTRAL, {"architecture": "mixtral", "num_experts": 8, "experts_per_token": 2, "qkv_bias": False}),
}


def new_spelling(old: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 writes it."""
    new = {name: value for name, value in old.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    rope = {"rope_type": "default", **(old.get("rope_scaling") or {}), "rope_theta": old.get("rope_theta", 10000.0)}
    return {**new, "dtype": old["torch_dtype"], "rope_parameters": rope}


def read(hf: dict[str, Any], **generation: Any) -> ModelConfig:
    return from_hf(hf, generation)


@pytest.mark.parametrize("model", EXPECTED)
def test_published_configs_in_both_spellings(model: str) -> None:
    hf, expected = EXPECTED[model]
    config = read(hf)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.vocab_size == hf["vocab_size"]
    assert config.hidden_size == hf["hidden_size"]
    assert read(new_spelling(hf)) == config


def test_the_older_name_of_the_scaling_type() -> None:
    config = read(LLAMA2 | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope == RopeConfig(scaling="linear", factor=2.0)


def test_defaults_of_old_configs() -> None:
    old = {name: value for name, value in LLAMA2.items() if name not in ("num_key_value_heads", "torch_dtype")}
    config = read(old)
    assert (config.num_kv_heads, config.dtype) == (32, "float32")
    assert read(old | {"head_dim": 64}).head_dim == 64
    assert read(old | {"head_dim": None}).head_dim == 128
    assert read(old | {"eos_token_id": None}).eos_token_ids == ()
    assert read({name: value for name, value in old.items() if name != "eos_token_id"}).eos_token_ids == (2,)


def test_generation_config_has_the_last_word_on_eos(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA31))
    assert read_model_config(tmp_path).eos_token_ids == (128001, 128008, 128009)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert read_model_config(tmp_path).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["architectures", "LlamaForCausalLM", "GPT2LMHeadModel"]),
        ({"architectures": None}, ["'architectures' is missing"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures: expected one of"]),
        ({"vocab_size": None}, ["'vocab_size' is missing"]),
        ({"num_hidden_layers": "32"}, ["num_hidden_layers: expected an integer in 1..4096, got '32'"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, ["attention_bias is not supported"]),
        ({"mlp_bias": True}, ["mlp_bias is not supported"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config: key 'quant_method' is missing"]),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 4}}, ["'proportional'", "llama3"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, ["'longrope'", "key 'short_factor' is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, ["rope", "Expected `float`, got `str`", "factor"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope scaling 'linear'", "key 'factor' is missing"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["'llama3'", "key 'low_freq_factor' is missing"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "'default' has no key 'factor'", "rope_type"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, ["'linear' has no key 'beta_fast'"]),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, ["rope_type 'llama3' and type 'linear'"]),
        ({"rope_scaling": "linear"}, ["rope_scaling: expected an object or null, got 'linear'"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["rope", "factor", "> 0", "got 0.0"]),
        ({"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}}, ["low_freq_factor <", "got 4.0, 4.0"]),
        ({"rope_theta": -1}, ["rope", "theta", "> 0", "got -1.0"]),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, ["rope_parameters.rope_theta 1", "500000.0"]),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            ["rope_parameters", "each kind of layer (full_attention)", "one for all layers"],
        ),
        ({"dtype": "bfloat16"}, ["dtype 'bfloat16' and torch_dtype 'float16'"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads: expected an integer in 1..2147483647, got 0"]),
        ({"head_dim": 0}, ["head_dim: expected an integer in 1..4096, got 0"]),
        ({"architectures": [["LlamaForCausalLM"]]}, ["architectures: expected one of"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
        ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
        ({"head_dim": 63}, ["odd head_dim, 63"]),
        ({"hidden_size": 4100}, ["hidden_size 4100", "32 heads"]),
        ({"hidden_size": 0}, ["hidden_size: expected an integer in 1..2147483647, got 0"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "dtype"]),
    ],
)
def test_what_cannot_be_used_is_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read(LLAMA2 | change)
    assert all(word in str(error.value) for word in ["config.json", *words]), str(error.value)


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 4.0}, LLAMA3_SCALING, {"type": "yarn", "factor": 4}])
def test_a_scaling_beside_another_one_is_refused(scaling: dict[str, Any]) -> None:
    """As model cards have it: `rope_scaling` added to what transformers 5 saved."""
    with pytest.raises(ConfigError, match="rope"):
        read(new_spelling(LLAMA2) | {"rope_scaling": scaling})


def test_two_spellings_of_a_scaling_may_agree() -> None:
    config = read(LLAMA31)
    both = new_spelling(LLAMA31) | {"rope_scaling": LLAMA3_SCALING}
    assert read(both) == config
    assert read(both | {"rope_theta": 500000.0}) == config
    for neither in (None, {}):
        assert read(new_spelling(LLAMA31) | {"rope_scaling": neither}) == config
        assert read(LLAMA31 | {"rope_parameters": neither}) == config
    with pytest.raises(ConfigError, match=r"rope_parameters .*8\.0.* and rope_scaling .*16\.0.* say two things"):
        read(both | {"rope_scaling": LLAMA3_SCALING | {"factor": 16.0}})


def test_either_name_of_the_number_of_experts() -> None:
    other = {name: value for name, value in MIXTRAL.items() if name != "num_local_experts"}
    assert read(other | {"num_experts": 4}).num_experts == 4
    assert read(MIXTRAL | {"num_experts": 8}).num_experts == 8
    with pytest.raises(ConfigError, match="num_local_experts 8 and num_experts 4 say two things"):
        read(MIXTRAL | {"num_experts": 4})


def test_more_experts_a_token_than_experts() -> None:
    with pytest.raises(ConfigError, match=r"num_experts_per_tok 9.*num_local_experts 8"):
        read(MIXTRAL | {"num_experts_per_tok": 9})


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_readable_config(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path)


def test_llama3_scaling_by_wavelength() -> None:
    """As the model's authors give it: by the wavelength against the context that it was trained on."""
    rope = EXPECTED["llama31"][1]["rope"]
    plain = [500000.0 ** (-exponent / 64) for exponent in range(64)]
    for frequency, scaled in zip(plain, scale_frequencies(plain, rope, 131072), strict=True):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192 / 1:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert scaled == pytest.approx(expected, rel=1e-12)
