"""The model of an FP8 checkpoint in fp32, by transformers: weights times scales, inputs rounded by a format's tool."""

from __future__ import annotations

import json
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LARGEST = 448.0  # of float8_e4m3fn
BLOCK = 128  # rows and columns

Round = Callable[[str, Tensor], Tensor]  # module name, its input -> the input as FP8 holds it


def rounded_rows(x: Tensor) -> Tensor:
    """x [..., columns] through FP8 and back, with a scale a row."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def dequantised(folder: Path, rounded: Round, *, kv: bool = False) -> PreTrainedModel:
    """The files' model in fp32: weights times scales, inputs of what has a scale `rounded`; K and V, too, if `kv`."""
    state = load_file(folder / "model.safetensors")
    plain = {}
    for name, tensor in state.items():
        if name.endswith(("scale", "scale_inv")):
            continue
        scale = state.get(f"{name}_scale", state.get(f"{name}_scale_inv", torch.tensor(1.0))).float()
        if scale.ndim == 1 and len(scale) > 1:
            scale = scale[:, None]  # a row's
        elif scale.ndim == 2 and len(scale) < len(tensor):
            scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
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
    if kv:
        names = {module: name for name, module in model.named_modules()}

        def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
            k, v = (rounded(f"{names[module]}.{which}_bmm", x) for which, x in (("k", k), ("v", v)))
            return sdpa_attention_forward(module, q, k, v, *args, **options)

        AttentionInterface.register("rounded", attention)
        AttentionMaskInterface.register("rounded", sdpa_mask)
        model.set_attn_implementation("rounded")
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
