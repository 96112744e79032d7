"""Tensors that a checkpoint has in one: ranks get the same as from tensors by themselves, and wrong ones are named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.loading import load_rank
from support.places import ROOT
from torch import Tensor

from benchmarks.models.checkpoints import make, save
from nanoflow_backend.models.checkpoint import WeightsError

State = dict[str, Tensor]
SINGLE = "model.safetensors"
QKV, GATE_UP = "model.layers.1.self_attn.qkv_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"  # [8, 2 * 60, 64]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shard", ["60KB", "1GB"])
def test_experts_in_one_tensor_are_those_by_themselves(architecture: str, tp: int, shard: str, tmp_path: Path) -> None:
    model = make(architecture)
    apart = save(model, tmp_path / "apart", max_shard_size=shard)
    fused = save(model, tmp_path / "fused", max_shard_size=shard, save_original_format=False)
    for rank in range(tp):
        expected, found = load_rank(apart, rank, tp), load_rank(fused, rank, tp)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("tp", [1, 2])
def test_phi_3_is_llama_with_fused_tensors(tp: int, tmp_path: Path) -> None:
    phi3, state = save(make("phi3"), tmp_path / "phi3"), {}
    for name, tensor in load_file(phi3 / SINGLE).items():
        parts = {"qkv": (("q", "k", "v"), (128, 32, 32)), "gate_up": (("gate", "up"), (97, 97))}
        fused = name.split(".")[-2].removesuffix("_proj")
        names, heights = parts.get(fused, ((fused,), (len(tensor),)))
        for part, rows in zip(names, tensor.split(heights), strict=True):
            state[name.replace(f"{fused}_proj", f"{part}_proj")] = rows.contiguous()
    llama = save(make("llama"), tmp_path / "llama")
    save_file(state, llama / SINGLE)
    for rank in range(tp):
        expected, found = load_rank(llama, rank, tp), load_rank(phi3, rank, tp)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def fused(state: State) -> State:
    """A Llama's tensors as Phi-3 has them. A scale of one number becomes that of all parts, in `state` too."""
    made = dict(state)
    for whole, parts in {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": ("gate", "up")}.items():
        module = whole.split(".")[0]
        for name in [name for name in state if f"{module}.{parts[0]}_proj." in name]:
            names = [name.replace(f".{parts[0]}_proj.", f".{part}_proj.") for part in parts]
            if state[name].ndim == 0:  # of all parts
                state |= {other: state[name].clone() for other in names}
            tensors = [made.pop(other) for other in names]
            made[name.replace(f"{module}.{parts[0]}_proj", whole)] = (
                tensors[0] if tensors[0].ndim == 0 else torch.cat(tensors)
            )
    return made


@pytest.mark.parametrize("fixture", ["fbgemm_rows", "fp8_block", "fp8_tensor_static"])
@pytest.mark.parametrize("tp", [1, 2])
def test_scales_of_fused_weights_are_those_of_their_parts(fixture: str, tp: int, tmp_path: Path) -> None:
    """A Llama in FP8, and the same tensors as Phi-3 has them: scales of rows, of blocks, and one of all."""
    llama, phi3 = tmp_path / "llama", tmp_path / "phi3"
    state = load_file(ROOT / "tests" / "support" / "models" / "fp8" / fixture / SINGLE)
    made = fused(state)
    config = json.loads((ROOT / "tests" / "support" / "models" / "fp8" / fixture / "config.json").read_text())
    for folder, tensors, hf_class in ((llama, state, "LlamaForCausalLM"), (phi3, made, "Phi3ForCausalLM")):
        folder.mkdir()
        save_file(tensors, folder / SINGLE)
        text = json.dumps(config | {"architectures": [hf_class]})
        (folder / "config.json").write_text(text if folder == llama else re.sub("[qkv]_proj", "qkv_proj", text))
    assert any("qkv_proj.weight_scale" in name for name in made)
    for rank in range(tp):
        expected, found = load_rank(llama, rank, tp), load_rank(phi3, rank, tp)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("fixture", "key", "whole"),
    [
        ("ct_channel_token", "ignore", ["model.layers.0.self_attn.qkv_proj"]),
        ("ct_channel_token", "ignore", [r"re:.*layers\.0\..*qkv"]),
        ("ct_channel_token", "ignore", ["re:.*0.self_attn.q", "re:.*gate_proj"]),  # the second is gate_up_proj here
        ("fp8_block", "modules_to_not_convert", ["layers.0.self_attn.qkv_proj"]),
    ],
)
def test_what_stays_as_it_is_has_the_name_of_the_fused_module(
    fixture: str, key: str, whole: list[str], tmp_path: Path
) -> None:
    """A Llama in FP8 but for Q, K and V of layer 0, and the same tensors as Phi-3 has and names them."""
    llama, phi3 = tmp_path / "llama", tmp_path / "phi3"
    source = ROOT / "tests" / "support" / "models" / "fp8" / fixture
    left = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    weights = {name: tensor for name, tensor in load_file(source / SINGLE).items() if not name.endswith("bias")}
    state = {name: tensor for name, tensor in weights.items() if name.rpartition(".")[0] not in left}
    state |= {f"{module}.weight": weights[f"{module}.weight"].bfloat16() for module in left}
    made = fused(state)
    config = json.loads((source / "config.json").read_text())
    others = config["quantization_config"].get(key) or []
    for folder, tensors, hf_class, listed in (
        (llama, state, "LlamaForCausalLM", left), (phi3, made, "Phi3ForCausalLM", whole)
    ):  # fmt: skip
        folder.mkdir()
        save_file(tensors, folder / SINGLE)
        quantization = config["quantization_config"] | {key: [*others, *listed]}
        stated = config | {"architectures": [hf_class], "quantization_config": quantization}
        (folder / "config.json").write_text(json.dumps(stated))
    expected, found = load_rank(llama), load_rank(phi3)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in expected.items())
    assert [found[f"layers.0.{name}.weight"].dtype.itemsize for name in ("qkv", "gate_up")] == [4, 1]


BROKEN: dict[str, tuple[str, Callable[[State], object], list[str]]] = {
    "rows too few": (
        "phi3", lambda s: s.update({QKV: s[QKV][:-1].clone()}), [QKV, "expected shape [192, 64], got [191, 64]"],
    ),
    "flat": ("phi3", lambda s: s.update({QKV: s[QKV].flatten()}), [QKV, "expected shape [192, 64], got [12288]"]),
    "of another dtype": ("phi3", lambda s: s.update({QKV: s[QKV].to(torch.int8)}), [QKV, "expected dtype"]),
    "missing": ("phi3", lambda s: s.pop(GATE_UP), ["mlp.gate_proj.weight is missing (and 1 more)"]),
    "a part beside it": (
        "phi3",
        lambda s: s.update({GATE_UP.replace("gate_up", "up"): torch.zeros(97, 64)}),
        [GATE_UP, "is here, and so is model.layers.0.mlp.up_proj.weight, which is a part of it"],
    ),
    "of a third layer": (
        "phi3", lambda s: s.update({QKV.replace("1", "7"): s[QKV].clone()}), ["layers.7.self_attn.qkv", "not part of"],
    ),
    "transposed experts": (
        "mixtral",
        lambda s: s.update({EXPERTS: s[EXPERTS].mT.contiguous()}),
        [EXPERTS, "expected shape [8, 120, 64], got [8, 64, 120]"],
    ),
    "experts too few": (
        "mixtral", lambda s: s.update({EXPERTS: s[EXPERTS][:7].clone()}), ["experts.7.w1.weight is missing"],
    ),
    "experts too many": (
        "qwen3_moe",
        lambda s: s.update({EXPERTS: torch.zeros(9, 120, 64)}),
        [f"tensor {EXPERTS} is not part of this qwen3_moe model"],
    ),
    "a scalar": (
        "qwen3_moe", lambda s: s.update({EXPERTS: torch.zeros(())}), [EXPERTS, "expected shape [120, 64], got []"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_wrong_is_named(fault: str, tmp_path: Path) -> None:
    architecture, break_it, words = BROKEN[fault]
    save(make(architecture), tmp_path, save_original_format=False)
    load_rank(tmp_path)
    state = load_file(tmp_path / SINGLE)
    break_it(state)
    save_file(state, tmp_path / SINGLE)
    with pytest.raises(WeightsError) as error:
        load_rank(tmp_path)
    assert all(word in str(error.value) for word in [str(tmp_path), *words]), str(error.value)
