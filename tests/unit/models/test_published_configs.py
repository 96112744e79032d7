"""config.json of published models: what is read, and as many parameters as the checkpoints have by their headers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from nanoflow_search.cost.model import ModelSize

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import RopeConfig
from nanoflow_backend.models.hugging_face import from_hf
from nanoflow_backend.models.refused import MISSING
from nanoflow_backend.models.registry import ARCHITECTURES

LLAMA3_SCALING = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def config_json(
    class_name: str, sizes: tuple[int, ...], max_positions: int, theta: float, eps: float, **more: Any
) -> dict[str, Any]:
    """sizes: hidden, intermediate, layers, heads, kv heads, vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "architectures": [f"{class_name}ForCausalLM"],
        "attention_bias": False,
        "hidden_act": "silu",
        **dict(zip((*names, "vocab_size"), sizes, strict=True)),
        "max_position_embeddings": max_positions,
        "rms_norm_eps": eps,
        "rope_scaling": None,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


def longrope(pairs: int, **more: Any) -> dict[str, Any]:
    factors = [1 + i / pairs for i in range(pairs)]
    return {"type": "longrope", "short_factor": factors, "long_factor": factors[::-1], **more}


QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 48}
QWEN3 = {"head_dim": 128, **QWEN_WINDOW}
QWEN3_MOE = QWEN3 | {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
MODELS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {  # config.json, parameters, some of what is read
    "Llama-3.2-1B": (
        config_json(
            "Llama", (2048, 8192, 16, 32, 8, 128256), 131072, 5e5, 1e-5,
            rope_scaling=LLAMA3_SCALING, tie_word_embeddings=True, head_dim=64, mlp_bias=False, pretraining_tp=1,
        ),
        1_235_814_400,
        {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "Llama-3.3-70B": (
        config_json(
            "Llama", (8192, 28672, 80, 64, 8, 128256), 131072, 5e5, 1e-5,
            rope_scaling=LLAMA3_SCALING | {"factor": 8.0}, eos_token_id=[128001, 128008, 128009],
        ),
        70_553_706_496,
        {"eos_token_ids": (128001, 128008, 128009)},
    ),
    "Yi-34B": (
        config_json("Llama", (7168, 20480, 60, 56, 8, 64000), 4096, 5e6, 1e-5), 34_388_917_248, {"head_dim": 128},
    ),
    "DeepSeek-67B": (
        config_json("Llama", (8192, 22016, 95, 64, 8, 102400), 4096, 1e4, 1e-6), 67_425_001_472, {"num_layers": 95},
    ),
    "Qwen2.5-7B": (
        config_json("Qwen2", (3584, 18944, 28, 28, 4, 152064), 32768, 1e6, 1e-6, sliding_window=131072),
        7_615_616_512,
        {"qkv_bias": True, "qk_norm": False, "head_dim": 128},
    ),
    "Qwen2.5-7B with yarn": (
        config_json(
            "Qwen2", (3584, 18944, 28, 28, 4, 152064), 32768, 1e6, 1e-6,
            rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        7_615_616_512,
        {
            "max_model_tokens": 131072,
            "rope": RopeConfig(
                theta=1e6, scaling="yarn", factor=4.0, original_max_positions=32768,
                attention_factor=1.138629436111989,  # 0.1 ln 4 + 1
            ),
        },
    ),
    "Qwen3-0.6B": (
        config_json(
            "Qwen3", (1024, 3072, 28, 16, 8, 151936), 40960, 1e6, 1e-6, tie_word_embeddings=True, **QWEN3
        ),
        596_049_920,
        {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "Qwen3-8B": (
        config_json("Qwen3", (4096, 12288, 36, 32, 8, 151936), 40960, 1e6, 1e-6, **QWEN3),
        8_190_735_360,
        {"qk_norm": True, "max_model_tokens": 40960},
    ),
    "Qwen3-30B-A3B": (
        config_json("Qwen3Moe", (2048, 6144, 48, 32, 4, 151936), 40960, 1e6, 1e-6, **QWEN3_MOE),
        30_532_122_624,
        {
            "num_experts": 128, "experts_per_token": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
            "dense_layers": (), "head_dim": 128,
        },
    ),
    "Mistral-7B-v0.1": (
        config_json("Mistral", (4096, 14336, 32, 32, 8, 32000), 32768, 1e4, 1e-5, sliding_window=4096),
        7_241_732_096,
        {"sliding_window": 4096},
    ),
    "Mistral-7B-v0.3": (
        config_json("Mistral", (4096, 14336, 32, 32, 8, 32768), 32768, 1e6, 1e-5, sliding_window=None),
        7_248_023_552,
        {"architecture": "mistral", "sliding_window": 0},
    ),
    "Mistral-Small-24B": (
        config_json("Mistral", (5120, 32768, 40, 32, 8, 131072), 32768, 1e8, 1e-5, sliding_window=None, head_dim=128),
        23_572_403_200,
        {"head_dim": 128},
    ),
    "Phi-3-mini-4k": (
        config_json("Phi3", (3072, 8192, 32, 32, 32, 32064), 4096, 1e4, 1e-5, sliding_window=2047),
        3_821_079_552,
        {"sliding_window": 2047, "head_dim": 96},
    ),
    "phi-4": (
        config_json(
            "Phi3", (5120, 17920, 40, 40, 10, 100352), 16384, 250000, 1e-5, sliding_window=None,
            partial_rotary_factor=1.0, original_max_position_embeddings=16384, eos_token_id=100265,
        ),
        14_659_507_200,
        {"architecture": "phi3", "eos_token_ids": (100265,), "head_dim": 128},
    ),
    "Seed-OSS-36B": (
        config_json(
            "SeedOss", (5120, 27648, 64, 80, 8, 155136), 524288, 1e7, 1e-6,
            head_dim=128, attention_bias=True, attention_out_bias=False, mlp_bias=False, residual_dropout=0.1,
            rope_scaling={"rope_type": "default"},
        ),
        36_151_104_512,
        {"qkv_bias": True, "o_bias": False, "head_dim": 128, "max_model_tokens": 524288},
    ),
    "SmolLM3-3B": (
        config_json(
            "SmolLM3", (2048, 11008, 36, 16, 4, 128256), 65536, 5e6, 1e-6, tie_word_embeddings=True, mlp_bias=False,
            no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, use_sliding_window=False, sliding_window=None,
            max_window_layers=28, layer_types=["full_attention"] * 36,
        ),
        3_075_098_624,
        {"unrotated_layers": tuple(range(3, 36, 4)), "sliding_window": 0, "head_dim": 128},
    ),
    "glm-4-9b": (
        config_json(
            "Glm", (4096, 13696, 40, 32, 2, 151552), 131072, 1e4, 1.5625e-7, head_dim=128, attention_bias=True,
            partial_rotary_factor=0.5, eos_token_id=[151329, 151336, 151338],
        ),
        9_399_951_360,
        {"qkv_bias": True, "o_bias": False, "rotates_neighbours": True, "rope": RopeConfig(partial_rotary_factor=0.5)},
    ),
    "ERNIE-4.5-0.3B": (
        config_json(
            "Ernie4_5", (1024, 3072, 18, 16, 2, 103424), 131072, 5e5, 1e-5, head_dim=128, use_bias=False,
            tie_word_embeddings=True,
        ),
        360_748_032,
        {"head_dim": 128, "rotates_neighbours": True, "rope": RopeConfig(theta=5e5)},
    ),
    "Phi-3.5-mini": (
        config_json(
            "Phi3", (3072, 8192, 32, 32, 32, 32064), 131072, 1e4, 1e-5, sliding_window=262144,
            original_max_position_embeddings=4096, rope_scaling=longrope(48),
        ),
        3_821_079_552,
        {"max_model_tokens": 131072, "head_dim": 96},
    ),
    "Phi-4-mini": (
        config_json(
            "Phi3", (3072, 8192, 32, 24, 8, 200064), 131072, 1e4, 1e-5, sliding_window=262144,
            original_max_position_embeddings=4096, partial_rotary_factor=0.75, rope_scaling=longrope(48),
            tie_word_embeddings=True,
        ),
        3_836_021_760,
        {"max_model_tokens": 131072, "head_dim": 128, "tie_word_embeddings": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_published_models_have_their_published_size(name: str) -> None:
    hf, parameters, expected = MODELS[name]
    config = from_hf(hf, {})
    assert {field: getattr(config, field) for field in expected} == expected
    assert ModelSize.of(config).parameters == parameters


def test_phi4_mini_rotates_three_quarters_of_a_head_by_factors_of_its_own() -> None:
    rope = from_hf(MODELS["Phi-4-mini"][0], {}).rope
    assert (rope.scaling, rope.rotated(128), rope.original_max_positions) == ("longrope", 96, 4096)
    assert (len(rope.short_factor), len(rope.long_factor)) == (48, 48)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


PHI4_MINI = MODELS["Phi-4-mini"][0]


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        (MODELS["Phi-3-mini-4k"][0] | {"sliding_window": 0}, "sliding_window: expected an integer in 1.."),
        (MODELS["Qwen3-8B"][0] | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 of this class is not"),
        (PHI4_MINI | {"partial_rotary_factor": 0}, "partial_rotary_factor: expected a number > 0 and <= 1, got 0"),
        (PHI4_MINI | {"partial_rotary_factor": 0.01}, "an even number of dimensions of a head (128), got 1"),
        (PHI4_MINI | {"partial_rotary_factor": 0.5}, "short_factor: expected 32 numbers, one for each frequency"),
        (PHI4_MINI | {"rope_scaling": longrope(48, long_factor=None)}, "'longrope': key 'long_factor' is missing"),
        (PHI4_MINI | {"rope_scaling": longrope(48, long_factor=[1.0, 0.0])}, "long_factor: expected numbers > 0, from"),
        (PHI4_MINI | {"rope_scaling": longrope(48, factor="32")}, "factor: expected a number > 0, got '32'"),
        (
            PHI4_MINI | {"rope_scaling": longrope(48, original_max_position_embeddings=8192)},
            "original_max_position_embeddings 4096 and rope_scaling.original_max_position_embeddings 8192 say two",
        ),
        (
            PHI4_MINI | {"original_max_position_embeddings": 1},
            "original_max_position_embeddings: expected an integer in 2..",
        ),
        (
            MODELS["phi-4"][0] | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope scaling 'yarn' of this class is not",
        ),
        (MODELS["Qwen2.5-7B"][0] | {"attention_bias": True}, "attention_bias is not supported"),
        (MODELS["SmolLM3-3B"][0] | {"no_rope_layers": [1] * 35}, "no_rope_layers: expected 0 or 1 for every layer"),
        (MODELS["SmolLM3-3B"][0] | {"no_rope_layers": [2] * 36}, "no_rope_layers: expected 0 or 1 for every layer"),
        (MODELS["ERNIE-4.5-0.3B"][0] | {"use_bias": True}, "use_bias is not supported"),
        (
            MODELS["glm-4-9b"][0]
            | {"architectures": ["HeliumForCausalLM"], "head_dim": 64, "partial_rotary_factor": 1},
            "hidden_size 4096 of heads with 2048 together is not supported",
        ),
        (MODELS["SmolLM3-3B"][0] | {"mlp_bias": True}, "mlp_bias is not supported"),
        (MODELS["Seed-OSS-36B"][0] | {"attention_out_bias": 1}, "attention_out_bias: expected true or false, got 1"),
        (MODELS["Qwen3-30B-A3B"][0] | {"decoder_sparse_step": 0}, "decoder_sparse_step: expected an integer in 1"),
        (MODELS["Qwen3-30B-A3B"][0] | {"mlp_only_layers": ["all"]}, "mlp_only_layers: expected an integer in 0"),
        (MODELS["Qwen3-30B-A3B"][0] | {"num_local_experts": 64}, "num_local_experts 64 and num_experts 128 say two"),
    ],
)
def test_what_a_family_has_and_this_engine_has_not_is_named(hf: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf(hf, {})
    assert words in str(error.value)


@pytest.mark.parametrize("class_name", MISSING)
def test_other_families_are_refused_with_what_is_missing(class_name: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf(MODELS["Qwen3-8B"][0] | {"architectures": [class_name]}, {})
    assert f"{class_name} is not supported: {MISSING[class_name]}" in str(error.value)
    assert class_name not in {architecture.hf_class for architecture in ARCHITECTURES.values()}


YARN_JSON = {key: value for key, value in MODELS["Qwen2.5-7B"][0].items() if key != "rope_theta"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": None}, "rope scaling 'yarn': key 'factor' is missing"),
        ({"factor": "4"}, "rope_scaling: factor: expected a number > 0, got '4'"),
        ({"mscale": 0}, "rope_scaling: mscale: expected a number > 0, got 0"),
        ({"beta_fast": 1, "beta_slow": 2}, "expected beta_slow <= beta_fast, got 2.0, 1.0"),
        ({"attention_factor": 0}, "attention_factor: expected a number > 0"),
        ({"low_freq_factor": 1}, "rope scaling 'yarn' has no key 'low_freq_factor'"),
        ({"truncate": "no"}, "Expected `bool`, got `str`"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings: expected an integer >= 1"),
        ({"rope_theta": 1}, "expected theta > 1 with yarn"),
    ],
)
def test_a_senseless_yarn_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf(YARN_JSON | {"rope_scaling": YARN | change}, {})
    assert words in str(error.value)
