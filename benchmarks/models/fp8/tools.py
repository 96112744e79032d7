"""Tiny FP8 checkpoints are made here by the formats' own tools, with the logits of each; the tests read them.

Each tool needs an environment of its own (TOOLS says which packages), beside torch on the CPU and transformers:

    python -m benchmarks.models.fp8 compressed-tensors tests/support/models/fp8

writes a folder a checkpoint: the tool's files, `expected.safetensors` (token ids [N] and logits [N, V], fp32, of a
forward in fp32 with the activations rounded as the format says) and `made_with.json` (what made it).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
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
from benchmarks.models.fp8.forward import LARGEST, dequantised, rounded_rows

VOCABULARY, CALIBRATION, TOKENS = 131, (16, 32), 64
PLAIN = {"vocab_size": VOCABULARY, "intermediate_size": 96}
IN_BLOCKS = PLAIN | {"hidden_size": 128, "head_dim": 128, "heads": 2, "intermediate_size": 256, "num_hidden_layers": 1}
EXPERTS = PLAIN | {"num_local_experts": 4, "intermediate_size": 64, "num_hidden_layers": 1}
KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}

# compressed-tensors, by llm-compressor


def compressed_tensors(folder: Path) -> None:
    _compress(folder / "ct_tensor_static_kv", "llama", PLAIN, "FP8", kv_cache_scheme=KV_SCHEME)
    # A whole fused layer left out by a pattern; the tool writes the full names that it matched.
    tied = PLAIN | {"tie_word_embeddings": True}
    some = ["lm_head", r"re:.*\.1\.mlp\.down_proj"]
    _compress(folder / "ct_channel_token", "qwen2", tied, "FP8_DYNAMIC", ignore=some)
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
        _write(folder, dequantised(folder, lambda _, x: rounded_rows(x)), "compressed-tensors", scheme)
        return
    # Its own forward. K and V go through FP8 there, if the recipe says so.
    _write(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "compressed-tensors", scheme)


# ModelOpt


def modelopt(folder: Path) -> None:
    _optimise(folder / "modelopt_kv", "llama", PLAIN, "FP8_DEFAULT_CFG", kv=True)
    _optimise(folder / "modelopt_experts", "mixtral", EXPERTS, "FP8_DEFAULT_CFG", kv=True)
    _optimise(folder / "modelopt_channel_token", "qwen2", PLAIN, "FP8_PER_CHANNEL_PER_TOKEN_CFG")


def _optimise(folder: Path, architecture: str, options: dict[str, Any], name: str, *, kv: bool = False) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint

    ids = _calibration()
    recipe = copy.deepcopy(getattr(mtq, name))
    recipe["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"] if kv else []
    model = mtq.quantize(_base(architecture, options), recipe, lambda model: [model(row[None]) for row in ids])
    quantizers = {
        re.sub(r"[._](input_)?quantizer$", "", each).replace("mlp.experts", "block_sparse_moe.experts"): module.float()
        for each, module in copy.deepcopy(model).named_modules()
        if each.endswith(("input_quantizer", "bmm_quantizer")) and module.is_enabled
    }
    export_hf_checkpoint(model, export_dir=folder)
    forward = dequantised(folder, lambda name, x: quantizers[name](x), kv=kv)
    _write(folder, forward, "nvidia-modelopt", f"{name} and FP8_KV_CFG" if kv else name)


# Fine-grained FP8 of transformers, and its per-tensor relative


def transformers(folder: Path) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    def in_blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
        quantizer = types.SimpleNamespace(quantization_config=FineGrainedFP8Config())
        return Fp8Quantize(quantizer).convert({f"{name}.weight": weight})

    def rounded(name: str, x: Tensor) -> Tensor:
        return rounded_rows(x.unflatten(-1, (-1, 128))).flatten(-2)

    scheme = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    _quantise(folder / "fp8_block", IN_BLOCKS | {"kv_heads": 1}, in_blocks, scheme)
    _write(folder / "fp8_block", dequantised(folder / "fp8_block", rounded), "transformers", "FineGrainedFP8Config")


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
    _quantise(
        folder, PLAIN, whole, {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    )
    scales = load_file(folder / "model.safetensors")

    def rounded(name: str, x: Tensor) -> Tensor:
        scale = scales[f"{name}.input_scale"]
        return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale

    _write(folder, dequantised(folder, rounded), "definition", "AutoFP8's layout")


# FBGEMM


def fbgemm(folder: Path) -> None:
    """Its own row quantiser, in torch; the package's libraries want CUDA, so that only this module is imported."""
    package = types.ModuleType("fbgemm_gpu")
    package.__path__ = list(importlib.util.find_spec("fbgemm_gpu").submodule_search_locations or ())
    sys.modules["fbgemm_gpu"] = package
    from fbgemm_gpu.experimental.gemm.triton_gemm.fp8_gemm import quantize_fp8_row

    first, second = (f"model.layers.{layer}.self_attn" for layer in range(2))
    skipped = ["lm_head", *(f"{first}.{part}_proj" for part in "qkvo"), f"{second}.o_proj"]
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
    _write(folder, dequantised(folder, rounded), "fbgemm-gpu-genai", "quantize_fp8_row")


# What they share


def _base(architecture: str, options: dict[str, Any]) -> PreTrainedModel:
    """A random bf16 model, as read from files: the tools look at where it came from."""
    folder = Path(tempfile.gettempdir()) / "fp8_checkpoints" / architecture
    model = make(architecture, **options)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)  # the best two tokens are rarely close
    model.bfloat16().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def _calibration() -> Tensor:
    return torch.randint(VOCABULARY, CALIBRATION, generator=torch.Generator().manual_seed(1))


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
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _write(folder: Path, model: PreTrainedModel, tool: str, recipe: str) -> None:
    """What `model` says to some tokens, and what made the folder."""
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model.eval()(ids[None]).logits[0].float()
    save_file({"token_ids": ids.int(), "logits": logits.contiguous()}, folder / "expected.safetensors")
    packages = (*TOOLS[tool][1], "transformers", "torch")
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
