"""What is said about FP8 checkpoints that are broken or not computed here, and about what only looks so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.models.fp8_checkpoints import FOLDER, changed, tensors
from support.models.loading import load_rank
from torch import Tensor

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.checkpoint import WeightsError
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load

KV, DYNAMIC, IN_BLOCKS, EXPERTS = "ct_tensor_static_kv", "ct_channel_token", "fp8_block", "modelopt_experts"
FIRST = "model.layers.0.self_attn"
Changes = Mapping[str, Tensor | None]


def with_pages(folder: Path) -> dict[str, Tensor]:
    """As it is loaded where KV pages are in FP8."""
    config = replace(read_model_config(folder), scaled_kv=True)
    return load(folder, config, build(config))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({f"{FIRST}.k_scale": None}, [f"tensor {FIRST}.k_scale is missing"]),
        ({f"{FIRST}.k_scale": None, f"{FIRST}.v_scale": None}, [f"tensor {FIRST}.k_scale is missing (and 1 more)"]),
        ({f"{FIRST}.k_scale": torch.tensor([torch.nan])}, [f"{FIRST}.k_scale: expected scales > 0, got nan"]),
        ({f"{FIRST}.v_scale": torch.tensor(torch.inf)}, [f"{FIRST}.v_scale: expected scales > 0, got inf"]),
        ({f"{FIRST}.k_scale": torch.tensor(0.0)}, [f"{FIRST}.k_scale: expected scales > 0, got 0"]),
        ({f"{FIRST}.k_scale": torch.tensor(-1.0)}, [f"{FIRST}.k_scale: expected scales > 0, got -1"]),
        ({f"{FIRST}.k_scale": torch.ones(2)}, [f"{FIRST}.k_scale", "[] or [1] or [1, 1], one scale a layer, got [2]"]),
        ({f"{FIRST}.k_scale": torch.ones(2, 1)}, ["one scale a layer, got [2, 1]"]),
        ({f"{FIRST}.k_scale": torch.tensor([1])}, [f"{FIRST}.k_scale: expected dtype F32, F16, BF16, got I64"]),
        ({f"{FIRST}.k_proj.k_scale": torch.ones(1)}, [f"{FIRST}.k_proj.k_scale", "under two names"]),
        ({f"{FIRST}.kv_scale": torch.ones(1)}, [f"{FIRST}.k_scale", f"{FIRST}.kv_scale", "under two names"]),
        ({f"{FIRST}.q_scale": torch.ones(1)}, [f"{FIRST}.q_scale is not part of this llama model"]),
    ],
)
def test_scales_of_k_and_v(state: Changes, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        with_pages(changed(KV, tmp_path, state))
    assert all(word in str(error.value) for word in ["model.safetensors", *words]), error.value


@pytest.mark.parametrize("spelling", ["{}_proj.{}_scale", "{}_proj.output_scale", "{}_scale"])
def test_names_of_scales_of_k_and_v(spelling: str, tmp_path: Path) -> None:
    state: dict[str, Tensor | None] = {}
    for layer in range(2):
        for number, part in enumerate("kv"):
            attention = f"model.layers.{layer}.self_attn"
            state |= {f"{attention}.{part}_scale": None}
            state[f"{attention}.{spelling.format(part, part)}"] = torch.tensor(0.25 + number + 2 * layer)
    loaded = with_pages(changed(KV, tmp_path, state))
    assert [loaded[f"layers.{layer}.kv.scales"].tolist() for layer in range(2)] == [[0.25, 1.25], [2.25, 3.25]]


def test_one_scale_for_k_and_v(tmp_path: Path) -> None:
    state: dict[str, Tensor | None] = {}
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        state |= {
            f"{attention}.k_scale": None,
            f"{attention}.v_scale": None,
            f"{attention}.kv_scale": torch.tensor(0.5),
        }
    assert with_pages(changed(KV, tmp_path, state))["layers.1.kv.scales"].tolist() == [0.5, 0.5]


def test_pages_in_fp8_without_scales(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loaded = with_pages(FOLDER / DYNAMIC)
    assert all(loaded[f"layers.{layer}.kv.scales"].tolist() == [1, 1] for layer in range(2))
    assert [record.getMessage() for record in caplog.records] == [
        f"{FOLDER / DYNAMIC}: has no scales for K and V in FP8: they are 1"
    ]


def test_scales_of_k_and_v_are_passed_over_where_pages_are_not_in_fp8(caplog: pytest.LogCaptureFixture) -> None:
    assert "layers.0.kv.scales" not in load_rank(FOLDER / KV)
    assert not caplog.records


Q = f"{FIRST}.q_proj"


def fp8(*shape: int) -> Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        (KV, {f"{Q}.weight_scale": torch.tensor([torch.nan])}, [f"{Q}.weight_scale: expected scales > 0, got nan"]),
        (KV, {f"{Q}.weight_scale": torch.tensor(0.0)}, [f"{Q}.weight_scale: expected scales > 0, got 0"]),
        (KV, {f"{Q}.input_scale": torch.tensor(-0.5)}, [f"{Q}.input_scale: expected scales > 0, got -0.5"]),
        (KV, {f"{Q}.weight_scale": None}, [f"tensor {Q}.weight_scale is missing"]),
        (KV, {f"{Q}.input_scale": None}, [f"tensor {Q}.input_scale is missing"]),
        (KV, {f"{Q}.weight_scale": torch.ones(128, 1)}, ["[1] or [1, 1], a scale a tensor, got [128, 1]"]),
        (DYNAMIC, {f"{Q}.weight_scale": torch.ones(1)}, ["shape [128] or [128, 1], a scale a channel, got [1]"]),
        (DYNAMIC, {f"{Q}.input_scale": torch.ones(1)}, [f"{Q}.input_scale is not part of this qwen2 model"]),
        (IN_BLOCKS, {f"{Q}.weight_scale_inv": torch.ones(2, 2)}, ["shape [2, 1], a scale a block, got [2, 2]"]),
        (IN_BLOCKS, {f"{Q}.weight_scale_inv": None}, [f"{Q}.weight_scale_inv is missing"]),
        (KV, {f"{Q}.weight": torch.ones(128, 64)}, [f"{Q}.weight: expected dtype F8_E4M3", "got F32"]),
        (KV, {f"{Q}.weight": fp8(128, 64).to(torch.float8_e5m2)}, ["expected dtype F8_E4M3", "got F8_E5M2"]),
        (KV, {f"{Q}.weight": fp8(128, 64).to(torch.float8_e4m3fnuz)}, ["expected dtype F8_E4M3", "got F8_E4M3FNUZ"]),
        (KV, {f"{Q}.weight": fp8(64, 64)}, ["expected shape [128, 64], got [64, 64]"]),
        (KV, {"lm_head.weight": fp8(131, 64)}, ["lm_head.weight: expected dtype F32", "lm_head", "got F8_E4M3"]),
        (KV, {"model.embed_tokens.weight": fp8(131, 64)}, ["embed_tokens.weight: expected dtype F32", "embeddings"]),
        (EXPERTS, {"model.layers.0.block_sparse_moe.gate.weight": fp8(4, 64)}, ["moe.gate.weight", "routers"]),
        (
            DYNAMIC,
            {"model.layers.1.mlp.down_proj.weight": fp8(64, 96)},
            ["down_proj", "quantization_config leaves out"],
        ),
        (KV, {f"{Q}.weight_zero_point": torch.zeros(1)}, [f"{Q}.weight_zero_point is not part of"]),
        (KV, {f"{Q}.weight_scale_inv": torch.ones(1)}, [f"{Q}.weight_scale", "under two names: expected one of them"]),
    ],
)
def test_tensors_that_contradict_the_config(name: str, state: Changes, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as error:
        load_rank(changed(name, tmp_path, state))
    assert all(word in str(error.value) for word in ["model.safetensors", *words]), error.value


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        (KV, {"ignore": ["lm_head", Q]}, ["expected all or none of", "q_proj.weight", "is left as it is"]),
        (KV, {"ignore": ["lm_head", "re:.*up_proj"]}, ["expected all or none of", "up_proj.weight is left as it is"]),
        (EXPERTS, {"ignore": ["lm_head", "*experts.2*"]}, ["expected all or none of", "experts.2.w1.weight is left"]),
    ],
)
def test_part_of_what_is_one_product_here(name: str, config: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_rank(changed(name, tmp_path, {}, config))
    assert all(word in str(error.value) for word in ["quantization_config", *words]), error.value


def test_ranks_that_would_cut_a_block() -> None:
    config = replace(read_model_config(FOLDER / IN_BLOCKS), intermediate_size=384)
    with pytest.raises(ConfigError, match=r"blocks of 128: .*gate_proj.weight .* on each of 2 ranks, got \[192, 128\]"):
        build(config, 2)


def test_blocks_whose_rows_would_move_to_others() -> None:
    """Rows of a head change places where it rotates neighbouring dimensions."""
    config = replace(read_model_config(FOLDER / IN_BLOCKS), rotates_neighbours=True, head_dim=128)
    build(config)
    with pytest.raises(ConfigError, match=r"expected a divisor of that for head_dim, since .*q_proj.weight .* got 256"):
        build(replace(config, head_dim=256))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_a_tensor_in_each_of_its_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    scales = {name: scale.reshape(shape) for name, scale in tensors(KV).items() if name.endswith("_scale")}
    before, after = load_rank(FOLDER / KV), load_rank(changed(KV, tmp_path, scales))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_either_name_of_scales_and_those_of_transformers_for_inputs(tmp_path: Path) -> None:
    state: dict[str, Tensor | None] = {}
    for name, tensor in tensors("fp8_tensor_static").items():
        other = name.replace("input_scale", "activation_scale").replace("weight_scale", "weight_scale_inv")
        if other != name:
            state |= {name: None, other: tensor}
    assert len(state) == 56
    before, after = load_rank(FOLDER / "fp8_tensor_static"), load_rank(changed("fp8_tensor_static", tmp_path, state))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_largest_scale_of_inputs_that_are_one(tmp_path: Path) -> None:
    scales = {
        f"{FIRST}.{part}_proj.input_scale": torch.tensor(value) for part, value in zip("qkv", (1, 3, 2), strict=True)
    }
    loaded = load_rank(changed(KV, tmp_path, {name: scale.float() for name, scale in scales.items()}))
    assert loaded["layers.0.qkv.weight.input_scale"].tolist() == [3]
