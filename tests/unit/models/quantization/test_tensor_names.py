"""Names that tools give to one thing, and the one that the loader has for it."""

from __future__ import annotations

import pytest

from nanoflow_backend.models.quantization.tensor_names import loaders_names

ATTENTION, EXPERT = "model.layers.3.self_attn", "model.layers.3.block_sparse_moe.experts.12"


@pytest.mark.parametrize(
    ("name", "names"),
    [
        (f"{ATTENTION}.k_scale", [f"{ATTENTION}.k_scale"]),
        (f"{ATTENTION}.k_proj.k_scale", [f"{ATTENTION}.k_scale"]),
        (f"{ATTENTION}.v_proj.v_scale", [f"{ATTENTION}.v_scale"]),
        (f"{ATTENTION}.k_proj.output_scale", [f"{ATTENTION}.k_scale"]),
        (f"{ATTENTION}.v_proj.output_scale", [f"{ATTENTION}.v_scale"]),
        (f"{ATTENTION}.kv_scale", [f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale"]),
        (f"{ATTENTION}.q_proj.output_scale", [f"{ATTENTION}.q_proj.output_scale"]),
        (f"{ATTENTION}.k_proj.v_scale", [f"{ATTENTION}.k_proj.v_scale"]),
        (f"{ATTENTION}.o_proj.activation_scale", [f"{ATTENTION}.o_proj.input_scale"]),
        (f"{ATTENTION}.o_proj.weight_scale_inv", [f"{ATTENTION}.o_proj.weight_scale"]),
        (f"{ATTENTION}.o_proj.weight", [f"{ATTENTION}.o_proj.weight"]),
        (f"{EXPERT}.gate_proj.weight", [f"{EXPERT}.w1.weight"]),
        (f"{EXPERT}.up_proj.weight_scale", [f"{EXPERT}.w3.weight_scale"]),
        (f"{EXPERT}.down_proj.weight_scale_inv", [f"{EXPERT}.w2.weight_scale"]),
        ("model.layers.3.mlp.gate_proj.weight", ["model.layers.3.mlp.gate_proj.weight"]),
        ("weight_scale", ["weight_scale"]),
    ],
)
def test_names(name: str, names: list[str]) -> None:
    assert loaders_names(name) == tuple(names)


def test_scales_of_weights_multiply_whatever_their_name() -> None:
    for name in ("weight_scale", "weight_scale_inv"):
        assert loaders_names(f"m.{name}", "weight_scale_inv") == ("m.weight_scale_inv",)
