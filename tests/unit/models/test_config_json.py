"""Values of config.json and generation_config.json that no model has."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import from_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
LLAMA3_SCALING = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"head_dim": 2**31 - 2}, ["head_dim: expected an integer in 1..4096, got 2147483646"]),
        ({"rms_norm_eps": -1e-5}, ["rms_norm_eps: expected a number >= 0 and < 1, got -1e-05"]),
        ({"rms_norm_eps": None}, ["rms_norm_eps: expected a number >= 0 and < 1, got None"]),
        ({"eos_token_id": -1}, ["eos_token_id: expected an integer in 0..2147483647, got -1"]),
        ({"eos_token_id": [2, True]}, ["eos_token_id: expected an integer in 0..2147483647, got True"]),
        ({"attention_bias": "no"}, ["attention_bias: expected true or false, got 'no'"]),
        ({"tie_word_embeddings": 0}, ["tie_word_embeddings: expected true or false, got 0"]),
        ({"rope_theta": 1e-300}, ["rope", "theta: expected a number > 0, from 1 to 1e15, got 1e-300"]),
        ({"rope_scaling": {"type": "linear", "factor": 1e300}}, ["factor: expected a number > 0, from 0.001 to"]),
        (
            {"rope_theta": 0, "rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 0}},
            ["theta: expected", "; original_max_position_embeddings: expected an integer >= 1"],
        ),
        ({"layer_types": ["full_attention"]}, ["layer_types: expected full_attention for every layer (32)"]),
    ],
)
def test_a_senseless_value_is_refused_by_its_rule(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf(LLAMA | change, {})
    assert all(word in str(error.value) for word in ["config.json", *words]), str(error.value)


@pytest.mark.parametrize("value", [-1, [5, -1], 1.5, "</s>", [[2]]])
def test_ends_that_are_no_token_are_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"/generation_config\.json: eos_token_id: expected an integer in 0\.\."):
        from_hf(LLAMA, {"eos_token_id": value}, "/model/config.json")
