"""What config.json and ModelOpt's own file say about quantization, as published; and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.quantization import Quantization
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.quantization.read import read_quantization

MODULES = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1, 10)
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "block_sparse_moe.gate")
] + ["lm_head"]

# As compressed-tensors 0.6 wrote them, with fewer keys than today.
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
CHANNELS, BLOCKS = WEIGHTS | {"strategy": "channel"}, WEIGHTS | {"strategy": "block", "block_structure": [128, 128]}
TOKENS = WEIGHTS | {"strategy": "token", "dynamic": True, "observer": None}
GROUPS = WEIGHTS | {"strategy": "group", "group_size": 128, "dynamic": True}


def group(weights: Any = WEIGHTS, activations: Any = WEIGHTS, **more: Any) -> dict[str, Any]:
    return {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    } | more


def compressed(*groups: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": each for i, each in enumerate(groups)},
        "format": "float-quantized",
        "global_compression_ratio": 1.23,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    } | more


FINE_GRAINED = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
AUTO_FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {
    "quant_method": "fbgemm_fp8",
    "activation_scale_ub": 1200.0,
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"],
}
OWN = {
    "producer": {"name": "modelopt", "version": "0.23.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "FP8",
    "config_groups": {"group_0": {"targets": ["Linear"]}},
    "ignore": ["lm_head", "*gate"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": OWN["producer"],
}
KV = ("k_scale", "v_scale")


@pytest.mark.parametrize(
    ("given", "weights", "activations", "kv_scales"),
    [
        (compressed(group()), "tensor", "static", None),
        (compressed(group(), kv_cache_scheme=WEIGHTS), "tensor", "static", KV),
        (compressed(group(CHANNELS)), "channel", "static", None),
        (compressed(group(CHANNELS, TOKENS), format="naive-quantized"), "channel", "token", None),
        (compressed(group(WEIGHTS, TOKENS)), "tensor", "token", None),
        (compressed(group(BLOCKS, GROUPS, format="float-quantized"), transform_config={}), "block", "group", None),
        (compressed(group(BLOCKS | {"block_structure": "128x128"}, GROUPS)), "block", "group", None),
        (compressed(group(CHANNELS, TOKENS), sparsity_config={"format": "dense"}), "channel", "token", None),
        (compressed(group(), group(targets=["re:.*mlp.*"])), "tensor", "static", None),
        (compressed(ignore=[], kv_cache_scheme=WEIGHTS), "tensor", "token", KV),  # the KV cache alone
        (FINE_GRAINED, "block", "group", None),
        (
            FINE_GRAINED | {"modules_to_convert": None, "scale_fmt": "float", "dequantize": False},
            "block",
            "group",
            None,
        ),
        (AUTO_FP8, "tensor", "static", None),
        (AUTO_FP8 | {"kv_cache_scheme": "static"}, "tensor", "static", KV),
        (AUTO_FP8 | {"activation_scheme": "dynamic", "weight_block_size": None}, "tensor", "token", None),
        (FBGEMM, "channel", "token", None),
        (MODELOPT, "tensor", "static", KV),
        (MODELOPT | {"kv_cache_scheme": "FP8"}, "tensor", "static", KV),
        (MODELOPT | {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "kv_cache_scheme": None}, "channel", "token", None),
        ({"quant_method": "modelopt", **OWN}, "tensor", "static", KV),  # as ModelOpt nested it in config.json once
    ],
)
def test_published_formats(
    given: dict[str, Any], weights: str, activations: str, kv_scales: tuple[str, str] | None
) -> None:
    found = read_quantization({"quantization_config": given}, None, "config.json")
    assert found is not None
    assert (found.method, found.weights, found.activations, found.kv_scales) == (
        given["quant_method"],
        weights,
        activations,
        kv_scales,
    )
    assert found.weight_scale == ("weight_scale_inv" if given is FINE_GRAINED else found.weight_scale)
    assert not found.at_load


@pytest.mark.parametrize(
    ("given", "excluded"),
    [
        (
            compressed(group(), ignore=["lm_head", "model.layers.1.mlp.down_proj"]),
            ["lm_head", "layers.1.mlp.down_proj"],
        ),
        (compressed(group(), ignore=["re:.*down_proj", "re:model.layers.1$"]), ["down_proj"]),
        (compressed(group(targets=["re:.*mlp.*", "lm_head"]), ignore=[]), ["self_attn", "moe.gate"]),
        (compressed(group(targets=["re:.*mlp.*"]), group(targets=["Linear"]), ignore=[]), []),
        (compressed(ignore=[], kv_cache_scheme=WEIGHTS), ["model", "lm_head"]),
        (FINE_GRAINED | {"modules_to_not_convert": ["lm_head", "gate"]}, ["lm_head", "block_sparse_moe.gate"]),
        (FINE_GRAINED | {"modules_to_not_convert": ["model.layers.1"]}, ["layers.1."]),
        (FINE_GRAINED | {"ignored_layers": ["model.layers.0.mlp.gate"]}, []),  # a whole module, not the start of one
        (FBGEMM, ["lm_head", "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"]),
        (MODELOPT, ["lm_head", "moe.gate"]),
        (MODELOPT | {"ignore": ["model.layers.1", "*self_attn*"]}, ["layers.1.", "self_attn"]),
        (MODELOPT | {"ignore": ["model.layers.1*"]}, ["layers.1"]),
    ],
)
def test_modules_that_stay_as_they_are(given: dict[str, Any], excluded: list[str]) -> None:
    found = read_quantization({"quantization_config": given}, None, "config.json")
    assert found is not None
    left = [module for module in MODULES if not found.covers(f"{module}.weight")]
    assert left == [module for module in MODULES if any(part in module for part in excluded)]


def test_experts_that_stay_by_the_names_that_llm_compressor_has_for_them() -> None:
    moe = "model.layers.0.block_sparse_moe.experts.1"
    given = compressed(group(), ignore=[f"{moe}.gate_proj", f"{moe}.up_proj"])
    found = read_quantization({"quantization_config": given}, None, "config.json")
    assert found is not None
    assert [found.covers(f"{moe}.{w}.weight") for w in ("w1", "w2", "w3")] == [False, True, False]


def test_bounds_of_activations() -> None:
    bounded = read_quantization({"quantization_config": FBGEMM | {"activation_scale_ub": 7}}, None, "config.json")
    default = read_quantization({"quantization_config": {"quant_method": "fbgemm_fp8"}}, None, "config.json")
    assert bounded is not None
    assert default is not None
    assert (bounded.activation_limit, default.activation_limit) == (7.0, 1200.0)


@pytest.mark.parametrize("nothing", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_nothing_is_quantised(nothing: dict[str, Any]) -> None:
    assert read_quantization(nothing, None, "config.json") is None


def test_the_older_key_of_compressed_tensors() -> None:
    given = compressed(group())
    expected = read_quantization({"quantization_config": given}, None, "config.json")
    assert read_quantization({"compression_config": given}, None, "config.json") == expected


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "vocab_size": 131,
}


def test_modelopt_has_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_model_config(tmp_path).quantization is None
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(OWN))
    alone = read_model_config(tmp_path).quantization
    assert alone is not None
    assert (alone.method, alone.weights, alone.activations, alone.kv_scales) == ("modelopt", "tensor", "static", KV)
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"quantization_config": MODELOPT | {"ignore": ["lm_head"]}})
    )
    assert read_model_config(tmp_path).quantization == alone
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"quantization_config": AUTO_FP8}))
    with pytest.raises(
        ConfigError, match=r"hf_quant_config\.json and .*config\.json: quantization_config say two things"
    ):
        read_model_config(tmp_path)


def test_dynamic_scales_of_a_batch_become_a_tokens_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    of_batch = WEIGHTS | {"dynamic": True}
    for _ in range(2):
        for given in (compressed(group(WEIGHTS, of_batch)), AUTO_FP8 | {"activation_scheme": "dynamic"}):
            found = read_quantization({"quantization_config": given}, None, "/said/once/config.json")
            assert found is not None
            assert found.activations == "token"
    assert [record.getMessage().partition(": ")[0] for record in caplog.records] == ["/said/once/config.json"] * 2
    assert "per token" in caplog.records[0].getMessage()


BITS = WEIGHTS | {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
WORKS = ["compressed-tensors (float-quantized)", '"quantization": "fp8" in engine.json']


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["quant_method 'gptq'", *WORKS]),
        ({"quant_method": "awq", "bits": 4}, ["quant_method 'awq'", *WORKS]),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, ["quant_method 'bitsandbytes'", *WORKS]),
        ({"quant_method": "mxfp4"}, ["quant_method 'mxfp4'", *WORKS]),
        ({"quant_method": "gguf"}, ["quant_method 'gguf'", *WORKS]),
        ({"quant_method": ["fp8"]}, ["quant_method ['fp8']", *WORKS]),
        ({"bits": 4}, ["key 'quant_method' is missing"]),
        ("fp8", ["expected an object or null, got 'fp8'"]),
        (compressed(group(BITS, None), format="pack-quantized"), ["format 'pack-quantized'", *WORKS]),
        (compressed(group(), format="int-quantized"), ["format 'int-quantized'", *WORKS]),
        (compressed(group(), format="nvfp4-pack-quantized"), ["format 'nvfp4-pack-quantized'"]),
        (compressed(group(WEIGHTS | {"type": "int"})), ["config_groups.group_0.weights", "8-bit int"]),
        (compressed(group(WEIGHTS, WEIGHTS | {"num_bits": 4})), ["group_0.input_activations", "4-bit float"]),
        (compressed(group(WEIGHTS | {"symmetric": False})), ["symmetric false"]),
        (compressed(group(WEIGHTS, None)), ["group_0", "only one of weights and input_activations"]),
        (compressed(group(None, WEIGHTS)), ["group_0", "only one of weights and input_activations"]),
        (compressed(group(output_activations=WEIGHTS)), ["output_activations"]),
        (compressed(group(format="int-quantized")), ["group_0", "format 'int-quantized'"]),
        (compressed(group(BLOCKS | {"block_structure": [64, 64]}, GROUPS)), ["block_structure [64, 64]", "[128, 128]"]),
        (compressed(group(BLOCKS, GROUPS | {"group_size": 64})), ["'group' of 64"]),
        (compressed(group(BLOCKS, TOKENS)), ["'block'", "'token'"]),
        (compressed(group(CHANNELS, WEIGHTS | {"dynamic": "local"})), ["dynamic 'local'"]),
        (compressed(group(CHANNELS, TOKENS | {"dynamic": False})), ["'token'", "dynamic False"]),
        (compressed(group(WEIGHTS | {"dynamic": True})), ["weights: dynamic True"]),
        (compressed(group(), group(CHANNELS, TOKENS)), ["group_0, group_1", "different ways"]),
        (compressed(group(), kv_cache_scheme=WEIGHTS | {"strategy": "attn_head"}), ["kv_cache_scheme", "'attn_head'"]),
        (compressed(group(), kv_cache_scheme=WEIGHTS | {"type": "int"}), ["kv_cache_scheme", "8-bit int"]),
        (compressed(group(), transform_config={"config_groups": {"u": {}}}), ["transform_config"]),
        (compressed(group(), sparsity_config={"format": "sparse-24-bitmask"}), ["sparse-24-bitmask"]),
        (compressed(group(), hadamard=True), ["unknown field", "`hadamard`"]),
        (compressed(group(WEIGHTS | {"scale_of_scales": 2})), ["unknown field", "`scale_of_scales`"]),
        (compressed(group(), ignore=["re:*"]), ["ignore", "'re:*'", "nothing to repeat"]),
        (FINE_GRAINED | {"weight_block_size": [64, 128]}, ["weight_block_size [64, 128] (only [128, 128])"]),
        (FINE_GRAINED | {"activation_scheme": "static"}, ["activation_scheme 'static' with weight_block_size"]),
        (FINE_GRAINED | {"activation_scheme": "group"}, ["activation_scheme", "group"]),
        (FINE_GRAINED | {"scale_fmt": "ue8m0"}, ["scale_fmt 'ue8m0'", *WORKS]),
        (FINE_GRAINED | {"fmt": "e4m3fnuz"}, ["fmt 'e4m3fnuz'", *WORKS]),
        (FINE_GRAINED | {"fmt": "e5m2"}, ["fmt 'e5m2'", *WORKS]),
        (FINE_GRAINED | {"expert_dtype": "fp4"}, ["expert_dtype 'fp4'"]),
        (FINE_GRAINED | {"modules_to_convert": ["model.embed_tokens"]}, ["modules_to_convert"]),
        (FINE_GRAINED | {"modules_to_not_convert": ["a"], "ignored_layers": ["b"]}, ["say two things"]),
        (FINE_GRAINED | {"zero_points": True}, ["unknown field", "`zero_points`"]),
        (FBGEMM | {"activation_scale_ub": 0.0}, ["activation_scale_ub", "> 0", "got 0.0"]),
        (FBGEMM | {"activation_scale_ub": "1200"}, ["activation_scale_ub", "float"]),
        (MODELOPT | {"quant_algo": "NVFP4"}, ["quant_algo 'NVFP4'", *WORKS]),
        (MODELOPT | {"quant_algo": "W4A8_AWQ"}, ["quant_algo 'W4A8_AWQ'", *WORKS]),
        (MODELOPT | {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}, ["quant_algo 'MIXED_PRECISION'"]),
        (MODELOPT | {"quant_algo": None}, ["quant_algo None"]),
        (MODELOPT | {"kv_cache_scheme": {"num_bits": 4, "type": "float"}}, ["KV cache", "'num_bits': 4"]),
        (MODELOPT | {"kv_cache_scheme": "NVFP4"}, ["KV cache", "'NVFP4'"]),
        (MODELOPT | {"pre_quant_scale": True}, ["unknown field", "`pre_quant_scale`"]),
        (MODELOPT | {"exclude_modules": ["other"]}, ["say two things"]),
    ],
)
def test_what_is_not_computed_here_is_refused_by_name(given: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        read_quantization({"quantization_config": given}, None, "/model/config.json")
    assert all(word in str(error.value) for word in ["/model/config.json: quantization_config", *words]), error.value


def test_an_unknown_key_that_says_nothing_is_no_fault() -> None:
    given = compressed(group(), new_key=None)
    assert isinstance(read_quantization({"quantization_config": given}, None, "config.json"), Quantization)
