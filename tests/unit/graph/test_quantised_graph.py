"""The graph of a model in FP8: what is quantised, where, and what its parameters are."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from support.models.shapes import config

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.quantization import AT_LOAD, FP8, Quantization
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.fusion import fuse_quantise
from nanoflow_backend.graph.operation import Graph, ScaleOf, Source
from nanoflow_backend.models.model import build

LLAMA = config("llama")


def quantised(of: ModelConfig = LLAMA, quantization: Quantization = AT_LOAD, tp: int = 1, **fields: object) -> Graph:
    return build(replace(of, quantization=quantization, **fields), tp).layer


def test_every_product_of_a_layer_has_e4m3_operands_and_norms_quantise_what_they_write() -> None:
    layer = quantised()
    assert [(op.name, op.kernel) for op in layer.operations] == [
        ("attention_norm", "add_rms_norm_quantise"),
        ("qkv", "scaled_linear"),
        ("rope_append", "rope_append"),
        ("attention", "attention"),
        ("attention_quantise", "quantise"),
        ("o", "scaled_linear"),
        ("attention_reduce", "all_reduce"),
        ("mlp_norm", "add_rms_norm_quantise"),
        ("gate_up", "scaled_linear_swiglu"),
        ("gate_up_quantise", "quantise"),
        ("down", "scaled_linear"),
        ("mlp_reduce", "all_reduce"),
    ]
    for op in layer.operations:
        if op.kernel.startswith("scaled"):
            x, scale = (layer.values[name] for name in op.inputs)
            assert (x.dtype, scale.dtype, scale.width) == (FP8, "float32", 1)
    assert "attention_norm" not in layer.values


def test_weights_have_a_scale_a_row_and_what_is_no_product_stays() -> None:
    model = build(replace(LLAMA, quantization=AT_LOAD))
    parameters = {p.name: p for p in model.layer.parameters}
    weight, scale = parameters["gate_up.weight"], parameters["gate_up.weight.scale"]
    assert (weight.dtype, scale.dtype, scale.scale) == (FP8, "float32", ScaleOf.WEIGHT)
    assert scale.shape == weight.shape[:1]
    assert (scale.sources, scale.interleave, scale.run) == (weight.sources, 2, 1)
    assert {p.dtype for p in (*model.embed.parameters, *model.head.parameters)} == {"weights"}
    assert parameters["input_layernorm.weight"].dtype == "weights"
    assert "kv.scales" not in parameters
    assert all(op.parameters != ("kv.scales",) for op in model.layer.operations)


def test_experts_take_a_scale_for_each_of_their_parts_and_the_router_stays() -> None:
    layer = quantised(config("mixtral"))
    kernels = {op.name: op.kernel for op in layer.operations}
    assert kernels["router"] == "linear"
    assert kernels["mlp_norm"] == "add_rms_norm"  # the router reads what it writes, too
    assert kernels["mlp_norm_quantise"] == "quantise"
    assert (kernels["gate_up"], kernels["down"]) == ("scaled_grouped_linear_swiglu", "scaled_grouped_combine")
    assert layer.values["gate_up.scale"].width == config("mixtral").experts_per_token
    assert layer["gate_up_quantise"].attributes["group"] == config("mixtral").intermediate_size
    scales = {p.name: p.shape for p in layer.parameters if p.scale is ScaleOf.WEIGHT}
    experts, hidden = config("mixtral").num_experts, config("mixtral").hidden_size
    assert scales["gate_up.weight.scale"] == (experts, 2 * config("mixtral").intermediate_size)
    assert scales["down.weight.scale"] == (experts, hidden)


def test_static_scales_of_inputs_are_parameters_of_what_quantises() -> None:
    layer = quantised(quantization=Quantization(method="modelopt", weights="tensor", activations="static"))
    assert layer["attention_norm"].parameters == ("input_layernorm.weight", "qkv.weight.input_scale")
    assert layer["gate_up_quantise"].parameters == ("down.weight.input_scale",)
    shapes = {p.name: p.shape for p in layer.parameters if p.scale is ScaleOf.INPUT}
    assert shapes == {f"{name}.weight.input_scale": (1,) for name in ("qkv", "o", "gate_up", "down")}


BLOCKS = Quantization(method="fp8", weights="block", activations="group", weight_scale="weight_scale_inv")
WIDE = replace(LLAMA, hidden_size=256, intermediate_size=384, num_heads=8, num_kv_heads=4, head_dim=32)


def test_blocks_have_a_scale_and_gates_and_ups_take_turns_in_whole_blocks() -> None:
    layer = quantised(WIDE, BLOCKS)
    parameters = {p.name: p for p in layer.parameters}
    assert parameters["gate_up.weight.scale"].shape == (6, 2)
    assert (parameters["gate_up.weight"].interleave, parameters["gate_up.weight"].run) == (2, 128)
    assert parameters["qkv.weight"].run == 1
    assert layer.values["gate_up.scale"].width == 3
    assert (layer["gate_up"].kernel, layer["gate_up_quantise"].kernel) == ("scaled_linear", "swiglu_quantise")
    assert layer.values["gate_up"].width == 2 * WIDE.intermediate_size
    assert layer["gate_up_quantise"].attributes == {"group": 128, "upper_bound": 0.0, "run": 128}


@pytest.mark.parametrize(
    ("of", "tp", "message"),
    [
        (replace(WIDE, intermediate_size=400), 1, r"multiple of that in rows and columns, got \[400, 256\]"),
        (WIDE, 2, r"k_proj.weight to have a multiple of that in rows and columns on each of 2 ranks, got \[64, 256\]"),
    ],
)
def test_blocks_that_are_not_whole_are_refused(of: ModelConfig, tp: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantised(of, BLOCKS, tp)


def test_pages_have_scales_with_and_without_quantised_weights() -> None:
    for layer in (quantised(scaled_kv=True), build(replace(LLAMA, scaled_kv=True)).layer):
        assert layer["rope_append"].parameters == ("rope.frequencies", "kv.scales")
        assert layer["attention"].parameters == ("kv.scales",)
        (scales,) = (p for p in layer.parameters if p.scale is ScaleOf.KV)
        assert [s.tensor.split(".")[-2] for s in scales.sources] == ["k_proj", "v_proj"]


def test_layers_that_a_quantization_leaves_as_they_are_are_of_another_kind() -> None:
    some = Quantization(
        method="fbgemm_fp8", excluded=("re:model.layers.0.*", "model.layers.2.mlp.down_proj", "lm_head")
    )
    model = build(replace(LLAMA, num_layers=4, quantization=some))
    assert model.kind_of == (0, 1, 2, 1)
    kernels = [{op.name: op.kernel for op in graph.operations} for graph in model.layers]
    assert [k["qkv"] for k in kernels] == ["linear", "scaled_linear", "scaled_linear"]
    assert [k["down"] for k in kernels] == ["linear", "scaled_linear", "linear"]


def test_part_of_what_is_one_product_here_is_refused() -> None:
    some = Quantization(method="compressed-tensors", excluded=("re:.*v_proj",))
    with pytest.raises(ConfigError, match=r"expected all or none of .*q_proj.*v_proj.weight is left as it is"):
        quantised(quantization=some)


def test_what_somebody_else_reads_is_not_fused_away() -> None:
    g = GraphBuilder(quantization=AT_LOAD)
    residual, update = g.input("residual", 4), g.input("update", 4)
    residual, x = g.add_rms_norm("norm", residual, update, g.weight("n", Source("n", (4,))), 1e-5)
    y = g.linear("y", x, g.weight("w", Source("w", (4, 4))))
    graph = g.build(residual, x, y)
    assert [op.kernel for op in graph.operations] == ["add_rms_norm", "quantise", "scaled_linear"]
    assert fuse_quantise(graph) == graph
