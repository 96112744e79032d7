"""Tiny FP8 checkpoints are made here by the formats' own tools, with the logits of each; the tests read them.

Each tool needs an environment of its own (TOOLS says which packages), beside torch on the CPU and transformers:

    PYTHONPATH=. python benchmarks/models/fp8_checkpoints.py compressed-tensors tests/support/models/fp8

writes a folder a checkpoint: the tool's files, `expected.safetensors` (token ids [N] and logits [N, V], fp32, of a
forward in fp32 with the activations rounded as the format says) and `made_with.json` (what made it).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.models.checkpoints import make

VOCABULARY, CALIBRATION, TOKENS = 131, (16, 32), 32
LARGEST = 448.0  # of float8_e4m3fn
PLAIN = {"vocab_size": VOCABULARY, "intermediate_size": 96}
IN_BLOCKS = PLAIN | {"hidden_size": 128, "head_dim": 128, "heads": 2, "intermediate_size": 256, "num_hidden_layers": 1}
EXPERTS = PLAIN | {"num_local_experts": 4, "intermediate_size": 64, "num_hidden_layers": 1}
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

Round = Callable[[str, Tensor], Tensor]  # module name, its input -> the input as FP8 holds it


# compressed-tensors, by llm-compressor


def compressed_tensors(folder: Path) -> None:
    _compress(folder / "ct_tensor_static_kv", "llama", PLAIN, "FP8", kv_cache_scheme=KV_SCHEME)
    # A whole fused layer left out by a pattern; the tool writes the full names that it matched.
    tied = PLAIN | {"tie_word_embeddings": True}
    _compress(folder / "ct_channel_token", "qwen2", tied, "FP8_DYNAMIC", ignore=["lm_head", r"re:.*\.1\.mlp\.down_proj"])
    _compress(folder / "ct_experts", "mixtral", EXPERTS, "FP8_DYNAMIC", ignore=["lm_head", "re:.*gate$"])
    _compress(folder / "ct_block", "llama", IN_BLOCKS | {"kv_heads": 2}, "FP8_BLOCK")


def _compress(folder: Path, architecture: str, options: dict[str, Any], scheme: str, **recipe: Any) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    ids = _calibration()
    model = _base(architecture, options)
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0"),
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        recipe=QuantizationModifier(targets="Linear", scheme=scheme, **({"ignore": ["lm_head"]} | recipe)),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
    )
    model.save_pretrained(folder, save_compressed=True)
    if architecture == "mixtral":  # whose experts' names, as the tool writes them, transformers does not read
        _write(folder, _dequantised(folder, lambda _, x: _rounded(x, -1)), "compressed-tensors", scheme)
        return
    with tempfile.TemporaryDirectory() as temporary:  # its own forward, with KV in fp32
        plain_kv = Path(shutil.copytree(folder, Path(temporary) / "model"))
        config = json.loads((plain_kv / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"] = None
        (plain_kv / "config.json").write_text(json.dumps(config))
        loaded = AutoModelForCausalLM.from_pretrained(plain_kv, dtype=torch.float32)
        _write(folder, loaded, "compressed-tensors", scheme)


# ModelOpt


def modelopt(folder: Path) -> None:
    _optimise(folder / "modelopt_kv", "llama", PLAIN)
    _optimise(folder / "modelopt_experts", "mixtral", EXPERTS)


def _optimise(folder: Path, architecture: str, options: dict[str, Any]) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    ids = _calibration()
    recipe = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    recipe["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"]
    model = mtq.quantize(_base(architecture, options), recipe, lambda model: [model(row[None]) for row in ids])
    quantizers = {
        re.sub(r"[._]input_quantizer$", "", name).replace("mlp.experts", "block_sparse_moe.experts"): copy.deepcopy(module)
        for name, module in model.named_modules()
        if name.endswith("input_quantizer") and module.is_enabled
    }
    export_hf_checkpoint(model, export_dir=folder)
    _write(folder, _dequantised(folder, lambda name, x: quantizers[name].float()(x)), "nvidia-modelopt", "FP8_DEFAULT_CFG")


# Fine-grained FP8 of transformers, and its per-tensor relative


def transformers(folder: Path) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    def in_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
        quantizer = types.SimpleNamespace(quantization_config=FineGrainedFP8Config())
        return Fp8Quantize(quantizer).convert({f"{name}.weight": weight})

    def rounded(name: str, x: Tensor) -> Tensor:
        return _rounded(x.unflatten(-1, (-1, 128)), -1).flatten(-2)

    scheme = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    _quantise(folder / "fp8_block", IN_BLOCKS | {"kv_heads": 1}, in_blocks, scheme)
    _write(folder / "fp8_block", _dequantised(folder / "fp8_block", rounded), "transformers", "FineGrainedFP8Config")


def definition(folder: Path) -> None:
    """Per-tensor `fp8` has no tool on the package index: its layout is AutoFP8's README and vLLM's loader."""
    model, limits = _base("llama", PLAIN), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: limits.update({name: max(limits.get(name, 0), float(args[0].abs().max()))})
            )
    for row in _calibration():
        model(row[None])

    def whole(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.abs().max() / LARGEST
        quantised = (weight / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        input_scale = torch.tensor(limits[name] / LARGEST)
        return {f"{name}.weight": quantised, f"{name}.weight_scale": scale, f"{name}.input_scale": input_scale}

    folder = folder / "fp8_tensor_static"
    _quantise(folder, PLAIN, whole, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]})
    scales = load_file(folder / "model.safetensors")

    def rounded(name: str, x: Tensor) -> Tensor:
        scale = scales[f"{name}.input_scale"]
        return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale

    _write(folder, _dequantised(folder, rounded), "definition", "AutoFP8's layout")


# FBGEMM


def fbgemm(folder: Path) -> None:
    """Its own row quantiser, in torch; the package's libraries want CUDA, so that only this module is imported."""
    package = types.ModuleType("fbgemm_gpu")
    package.__path__ = list(importlib.util.find_spec("fbgemm_gpu").submodule_search_locations or ())
    sys.modules["fbgemm_gpu"] = package
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_row

    skipped = ["lm_head", *(f"model.layers.0.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj"))]
    skipped += ["model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    limit = 2.5  # some inputs are beyond it

    def rows(name: str, weight: Tensor) -> dict[str, Tensor]:
        quantised, scale = quantize_fp8_row(weight.float())
        return {f"{name}.weight": quantised, f"{name}.weight_scale": scale[:, None].clone()}

    def rounded(name: str, x: Tensor) -> Tensor:
        # Its kernels saturate what the limit cuts; its torch form does not.
        quantised, scale = quantize_fp8_row(x.clamp(-limit, limit), torch.tensor(limit))
        return quantised.float() * scale[..., None]

    folder = folder / "fbgemm_rows"
    scheme = {"quant_method": "fbgemm_fp8", "activation_scale_ub": limit, "modules_to_not_convert": skipped}
    _quantise(folder, PLAIN, rows, scheme)
    _write(folder, _dequantised(folder, rounded), "fbgemm-gpu-genai", "quantize_fp8_row")


# What they share


def _base(architecture: str, options: dict[str, Any]) -> PreTrainedModel:
    """A random bf16 model, as read from files: the tools look at where it came from."""
    folder = Path(tempfile.gettempdir()) / "fp8_checkpoints" / architecture
    make(architecture, **options).bfloat16().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _calibration() -> Tensor:
    return torch.randint(VOCABULARY, CALIBRATION, generator=torch.Generator().manual_seed(1))


def _rounded(x: Tensor, dim: int) -> Tensor:
    """x through FP8 and back, with a scale for all that lies along `dim`."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _quantise(
    folder: Path, options: dict[str, Any], quantise: Callable[[str, Tensor], dict[str, Tensor]], scheme: dict[str, Any]
) -> None:
    """Save a Llama whose linear layers went through `quantise` (module, weight -> tensors by full name)."""
    model = _base("llama", options)
    skipped = scheme.get("modules_to_not_convert", ["lm_head"])
    state = {}
    for name, tensor in model.state_dict().items():
        module = name.removesuffix(".weight")
        linear = isinstance(model.get_submodule(module), torch.nn.Linear) and module not in skipped
        state |= quantise(module, tensor) if linear else {name: tensor}
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"quantization_config": scheme}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})


def _dequantised(folder: Path, rounded: Round) -> PreTrainedModel:
    """The files' model in fp32: weights times scales, inputs of what has a scale `rounded`."""
    state = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in state.items():
        if name.endswith(("scale", "scale_inv")):
            continue
        scale = state.get(f"{name}_scale", torch.tensor(1.0)).float()
        if f"{name}_scale_inv" in state:
            scale = state[f"{name}_scale_inv"].float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        for theirs, ours in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = name.replace(theirs, ours) if "experts" in name else name
        plain[name] = tensor.float() * scale
    with tempfile.TemporaryDirectory() as temporary:
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        save_file(plain, Path(temporary) / "model.safetensors", {"format": "pt"})
        model, loading = AutoModelForCausalLM.from_pretrained(temporary, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values()), loading
    for name, module in model.named_modules():
        if f"{name}.weight_scale" in state or f"{name}.weight_scale_inv" in state:
            module.register_forward_pre_hook(lambda _, args, name=name: (rounded(name, args[0]), *args[1:]))
        if name.endswith("mlp.experts"):
            module.forward = types.MethodType(_experts(rounded, name.replace("mlp", "block_sparse_moe")), module)
    return model


def _experts(rounded: Round, name: str) -> Callable[..., Tensor]:
    """MixtralExperts.forward with both inputs `rounded`; ModelOpt names their quantisers so."""

    def forward(self: Any, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(len(self.down_proj)):
            token, place = torch.where(chosen == expert)
            inputs = rounded(f"{name}.gate_up_proj", x[token])
            gate, up = (inputs @ self.gate_up_proj[expert].T).chunk(2, -1)
            inner = rounded(f"{name}.down_proj", torch.nn.functional.silu(gate) * up)
            y.index_add_(0, token, inner @ self.down_proj[expert].T * shares[token, place, None])
        return y

    return forward


def _write(folder: Path, model: PreTrainedModel, tool: str, recipe: str) -> None:
    """What `model` says to some tokens, and what made the folder."""
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model.eval()(ids[None]).logits[0].float()
    save_file({"token_ids": ids.int(), "logits": logits.contiguous()}, folder / "expected.safetensors")
    packages = [package for package in (*TOOLS[tool][1], "transformers", "torch")]
    made_with = {"tool": tool, "recipe": recipe, "versions": {package: version(package) for package in packages}}
    (folder / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n")
    for name in ("generation_config.json", "recipe.yaml"):
        (folder / name).unlink(missing_ok=True)


TOOLS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {  # what it makes, and the packages it needs
    "compressed-tensors": (compressed_tensors, ("llmcompressor", "compressed-tensors")),
    "nvidia-modelopt": (modelopt, ("nvidia-modelopt", "accelerate")),
    "transformers": (transformers, ("accelerate",)),
    "definition": (definition, ()),
    "fbgemm-gpu-genai": (fbgemm, ("fbgemm-gpu-genai", "triton")),
}


if __name__ == "__main__":
    TOOLS[sys.argv[1]][0](Path(sys.argv[2]))
