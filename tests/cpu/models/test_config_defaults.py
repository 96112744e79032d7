"""A key that config.json leaves out means the default of the architecture's own config class in transformers."""

from __future__ import annotations

import inspect
from copy import deepcopy
from random import Random
from typing import Any

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from benchmarks.models.checkpoints import CONFIGS
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import from_hf
from nanoflow_backend.models.registry import ARCHITECTURES

NO_NULLS = {
    "num_key_value_heads": (2, 4),
    "head_dim": (16, 32),
    "eos_token_id": (7, [5, 9]),
}  # 4.57 has some of these, as we do
STRICT = {  # keys that have no null in transformers 5.23
    "qwen3": ("head_dim",),
    "qwen3_moe": ("num_key_value_heads",),
    "mistral": ("num_key_value_heads",),
    "ministral": ("num_key_value_heads",),
    "glm": ("eos_token_id", "num_key_value_heads"),
    "mixtral": ("num_key_value_heads",),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
CHOICES: dict[str, tuple[Any, ...]] = {  # what config.json may say; none of it is any class's default
    "num_key_value_heads": (2, 4, None),
    "head_dim": (16, 32, None),
    "max_position_embeddings": (512, 4096),
    "rms_norm_eps": (1e-4, 3e-5),
    "tie_word_embeddings": (True,),
    "rope_theta": (5e5, 123.0),
    "rope_scaling": (None, {"type": "linear", "factor": 2.0}),
    "eos_token_id": (7, [5, 9], None),
    "hidden_act": ("silu",),
    "attention_bias": (False, True),
    "attention_out_bias": (True,),
    "use_bias": (None, False),
    "mlp_bias": (False,),
    "sliding_window": (None, 64),
    "use_sliding_window": (False, True),
    "max_window_layers": (0, 1, 4),
    "layer_types": (None, ["full_attention"] * 4, ["sliding_attention", "full_attention"] * 2),
    "no_rope_layers": (None, [1, 0, 0, 1], [1] * 4),
    "no_rope_layer_interval": (2, 3),
    "num_local_experts": (4, 16),
    "num_experts": (8, 16),
    "num_experts_per_tok": (1, 3),
    "moe_intermediate_size": (16, 32),
    "norm_topk_prob": (True,),
    "mlp_only_layers": (None, [], [1], [0, 3]),
    "decoder_sparse_step": (1, 2, 3),
}


def keys(architecture: str) -> list[str]:
    """Those of CHOICES that the architecture's class knows."""
    known = {*inspect.signature(CONFIGS[architecture]).parameters, "rope_theta", "rope_scaling"}
    return [key for key in CHOICES if key in known]


def config_json(architecture: str, rng: Random) -> dict[str, Any]:
    said = {key: rng.choice(CHOICES[key]) for key in keys(architecture)}
    said |= {key: rng.choice(NO_NULLS[key]) for key in STRICT.get(architecture, ())}
    if architecture == "phi3":
        said |= phi3_rope(rng)
    if architecture == "glm" and rng.random() < 0.5:
        said["partial_rotary_factor"] = rng.choice((0.25, 1.0))
    if architecture == "helium":  # its heads have the hidden size together
        said |= {"num_key_value_heads": rng.choice((2, 4)), "head_dim": 128}
    sizes = dict(zip(SIZES, (331, 2560, 96, 4, 20) if architecture == "helium" else (331, 512, 96, 4, 32), strict=True))
    return {"architectures": [ARCHITECTURES[architecture].hf_class], **sizes, **said}


def phi3_rope(rng: Random) -> dict[str, Any]:
    """Its only scaling is longrope, and it may rotate a part of each head, of 16 dimensions here."""
    share = rng.choice((None, 1.0, 0.5))
    factors = [1.0 + i for i in range(int(16 * (share or 1)) // 2)]
    longrope = {"type": "longrope", "short_factor": factors, "long_factor": factors[::-1]}
    beside = {"partial_rotary_factor": share, "original_max_position_embeddings": rng.choice((None, 256))}
    scaling = rng.choice((None, longrope, longrope | {"factor": 3.0}))
    return {"rope_scaling": scaling, **{key: value for key, value in beside.items() if value is not None}}


def windows(theirs: Any) -> list[int | None]:
    """Of each layer: 0 where it has none, None where it asks for one and transformers finds none in the file."""
    window = getattr(theirs, "sliding_window", None) if getattr(theirs, "use_sliding_window", True) else None
    if not hasattr(theirs, "layer_types"):
        return [window or 0] * theirs.num_hidden_layers
    return [window if kind == "sliding_attention" else 0 for kind in theirs.layer_types]


def assert_same_reading(hf: dict[str, Any], architecture: str) -> None:
    theirs = CONFIGS[architecture].from_dict(deepcopy(hf))  # it writes into what it is given
    if None in windows(theirs):
        with pytest.raises(ConfigError, match="sliding_attention, and sliding_window is null or not used"):
            from_hf(hf, {})
        return
    ours = from_hf(hf, {})
    eos = theirs.eos_token_id
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_model_tokens == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    has_bias = getattr(theirs, "attention_bias", False)
    assert ours.qkv_bias == (architecture == "qwen2" or has_bias)
    assert ours.o_bias == getattr(theirs, "attention_out_bias", has_bias and architecture not in ("glm", "helium"))
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope.scaling == theirs.rope_parameters["rope_type"]
    assert ours.rope.factor == theirs.rope_parameters.get("factor", 1.0)
    if architecture in ("phi3", "glm"):
        assert ours.rope.partial_rotary_factor == theirs.rope_parameters["partial_rotary_factor"]
    if ours.rope.scaling == "longrope":
        assert ours.rope.original_max_positions == theirs.rope_parameters["original_max_position_embeddings"]
        _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](theirs)
        assert ours.rope.attention_factor == attention_factor
    assert ours.eos_token_ids == tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    assert [0 if i in ours.full_attention_layers else ours.sliding_window for i in range(4)] == windows(theirs)
    rotated = getattr(theirs, "no_rope_layers", [1] * 4)
    assert ours.unrotated_layers == tuple(i for i in range(4) if not rotated[i])
    assert ours.num_experts == getattr(theirs, "num_local_experts", 0)
    assert ours.experts_per_token == getattr(theirs, "num_experts_per_tok", 0)
    if ours.num_experts:
        assert ours.moe_intermediate_size == getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert ours.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    if architecture == "qwen3_moe":
        sparse = [i not in theirs.mlp_only_layers and (i + 1) % theirs.decoder_sparse_step == 0 for i in range(4)]
        assert ours.dense_layers == tuple(i for i in range(4) if not sparse[i])


@pytest.mark.parametrize(("architecture", "key"), [(name, key) for name in CONFIGS for key in keys(name)])
def test_one_key_left_out(architecture: str, key: str) -> None:
    for seed in range(5):
        hf = config_json(architecture, Random(seed))
        del hf[key]
        assert_same_reading(hf, architecture)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_any_number_of_keys_left_out(architecture: str) -> None:
    rng = Random(0)
    for _ in range(200):
        hf = config_json(architecture, rng)
        for key in keys(architecture):
            if rng.random() < 0.5:
                del hf[key]
        assert_same_reading(hf, architecture)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_sizes_of_matrices_must_be_given(architecture: str, key: str) -> None:
    hf = config_json(architecture, Random(0)) | {"sliding_window": None}
    del hf[key]
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        from_hf(hf, {})


def test_every_key_of_the_classes_is_read_or_without_effect() -> None:
    """A key that a future transformers adds shows up here."""
    without_effect = {
        "attention_dropout", "initializer_range", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise",
        "pretraining_tp", "use_cache", "bos_token_id", "pad_token_id", "embd_pdrop", "resid_pdrop",
        "residual_dropout",
    }  # fmt: skip
    read = {*CHOICES, *SIZES, "rope_parameters", "original_max_position_embeddings"}  # the last is Phi-3's
    inherited = set(inspect.signature(CONFIGS["llama"].__mro__[1]).parameters)
    for kind in CONFIGS.values():
        assert set(inspect.signature(kind).parameters) - inherited <= read | without_effect
