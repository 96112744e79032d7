"""Checkpoints that the formats' own tools made: every rank's weights, and logits and tokens against the tools'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from nanoflow_kernels import reference
from safetensors.torch import load_file
from support.models.batches import forward
from support.models.fp8_checkpoints import FOLDER, NAMES
from support.models.loading import load_rank
from support.models.rank_parts import expected

from benchmarks.accuracy.relative_rms import relative_rms
from benchmarks.models.fp8.forward import dequantised
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.quantization import BLOCK, FP8
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.models.weights import load
from nanoflow_backend.runtime.binding import Binding
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.cpu import CpuProgram
from nanoflow_backend.schedule.presets import sequential

PAGE_TOKENS = 16


def test_every_checkpoint_says_what_made_it() -> None:
    made_with = {name: json.loads((FOLDER / name / "made_with.json").read_text()) for name in NAMES}
    assert all(made["recipe"] and made["versions"] for made in made_with.values())
    tools = {"compressed-tensors", "nvidia-modelopt", "transformers", "fbgemm-gpu-genai", "definition"}
    assert {made["tool"] for made in made_with.values()} == tools
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 3e6


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_tokens_are_those_of_the_tool(name: str) -> None:
    """K and V go through FP8 where the checkpoint has scales for them, as they do in its tool's forward."""
    config = read_model_config(FOLDER / name)
    assert config.quantization is not None
    config = replace(config, scaled_kv=config.quantization.kv_scales is not None)
    model, asked = build(config), load_file(FOLDER / name / "expected.safetensors")
    ids, logits = asked["token_ids"], asked["logits"]
    tokens, pages = len(ids), len(ids) // PAGE_TOKENS
    precision = Precision("float32", "float32", FP8 if config.scaled_kv else "float32")
    weights = load(FOLDER / name, config, model, precision=precision)
    kv = KvPages.allocate(config, pages, PAGE_TOKENS, getattr(torch, precision.kv), poison=True)
    binding = Binding(
        model,
        [sequential(model.layer, tokens)],
        weights,
        kv,
        OneRank(),
        reference,
        max_tokens=tokens,
        precision=precision,
    )
    program = CpuProgram(binding, checked=True)
    slots, page_table = torch.zeros(tokens).int(), torch.arange(pages)[None].int()
    forward(program, (ids, torch.arange(tokens).int(), slots, page_table))
    actual = program.head(torch.arange(tokens))
    assert relative_rms(actual, logits) < 1e-3
    first, second = logits.topk(2).values.unbind(-1)
    decided = first - second > 0.02
    assert decided.float().mean() >= 0.95
    assert torch.equal(actual.argmax(-1)[decided], logits.argmax(-1)[decided])


# Four ranks would cut the heads of those in blocks.
@pytest.mark.parametrize(("name", "tp"), [(n, tp) for n in NAMES for tp in (1, 2, 4) if tp < 4 or "block" not in n])
def test_every_rank_gets_its_part_of_weights_and_scales(name: str, tp: int) -> None:
    in_blocks = name.endswith("block")
    model = dequantised(FOLDER / name, lambda _, x: x)
    for rank in range(tp):
        loaded = load_rank(FOLDER / name, rank, tp)
        for parameter, whole in expected(model, rank, tp, BLOCK if in_blocks else 1).items():
            weight, scale = loaded[parameter], loaded.get(f"{parameter}.scale")
            assert (weight.dtype == torch.float8_e4m3fn) == (scale is not None), parameter
            if scale is not None:
                by_row = (
                    scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) if in_blocks else scale[..., None]
                )
                weight = weight.float() * by_row
            assert torch.equal(weight, whole), f"rank {rank} of {tp}: {parameter}"


def test_scales_of_inputs_and_of_k_and_v_are_those_of_the_files() -> None:
    for name, key in (("ct_tensor_static_kv", "model.layers.1.self_attn.{}_scale"), ("modelopt_kv", None)):
        folder: Path = FOLDER / name
        config = replace(read_model_config(folder), scaled_kv=True)
        weights, state = load(folder, config, build(config)), load_file(folder / "model.safetensors")
        of = [key.format(x) if key else f"model.layers.1.self_attn.{x}_proj.{x}_scale" for x in "kv"]
        assert weights["layers.1.kv.scales"].tolist() == [state[tensor].float().item() for tensor in of]
        module = "model.layers.1.self_attn.{}_proj.input_scale"
        assert weights["layers.1.qkv.weight.input_scale"].item() == state[module.format("v")].float().item()
        assert weights["layers.1.o.weight.input_scale"].item() == state[module.format("o")].float().item()
