"""A small model in FP8 and what it computes, in float64 and apart from the engine's code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import ScaleOf

BLOCK = 128


def made_weights(model: Model, seed: int) -> dict[str, Tensor]:
    """By the engine's names; spread enough for every operation, and every scale, to matter."""
    rng, made = torch.Generator().manual_seed(seed), {}
    graphs = [("", model.embed), *((f"layers.{i}.", g) for i, g in enumerate(model.in_order)), ("", model.head)]
    for prefix, graph in graphs:
        for p in graph.parameters:
            dtype = getattr(torch, FLOAT32.dtype(p.dtype))
            drawn = torch.randn(p.shape, generator=rng)
            if p.constant is not None:
                value = torch.tensor(p.constant)
            elif p.scale is ScaleOf.WEIGHT:
                columns = next(other for other in graph.parameters if f"{other.name}.scale" == p.name).shape[-1]
                value = (1 + 0.3 * drawn.clamp(-2, 2)) * columns**-0.5 / 100
            elif p.scale is not None:
                value = 0.02 * (1 + 0.3 * drawn.clamp(-2, 2))
            elif dtype == torch.float8_e4m3fn:
                value = e4m3(100 * drawn.double())
            else:
                value = drawn * p.shape[-1] ** -0.5 if len(p.shape) > 1 else 1 + 0.1 * drawn
            made[prefix + p.name] = value.to(dtype)
    return made


def e4m3(x: Tensor) -> Tensor:
    """The nearest value of e4m3 (the even one of two), in float64; beyond 448, 448."""
    exponent = torch.frexp(x.abs().clamp(2.0**-6))[1] - 1
    step = torch.ldexp(torch.ones_like(x), exponent - 3)
    return (torch.round(x / step) * step).clamp(-448, 448)


class Fp8Forward:
    """The logits of sequences. Products take operands that are quantised as ModelConfig.quantization says."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.config, self.q = config, config.quantization
        self.w = {name: tensor.double() for name, tensor in weights.items()}

    def logits(self, ids: Tensor) -> Tensor:
        """[tokens, vocabulary] in float64."""
        x, positions = self.w["embed.weight"][ids], torch.arange(len(ids)).double()
        for i in range(self.config.num_layers):
            start = f"layers.{i}."
            p = {name.removeprefix(start): t for name, t in self.w.items() if name.startswith(start)}
            x = x + self._attention(p, self._norm(x, p["input_layernorm.weight"]), positions)
            y = self._norm(x, p["post_attention_layernorm.weight"])
            x = x + (self._experts(p, y) if self.config.num_experts else self._mlp(p, y))
        return self._norm(x, self.w["norm.weight"]) @ self.w["lm_head.weight"].T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * weight

    def _product(self, p: Mapping[str, Tensor], name: str, x: Tensor, expert: int | None = None) -> Tensor:
        weight, scale = p[f"{name}.weight"], p.get(f"{name}.weight.scale")
        if scale is None or self.q is None:
            return x @ weight.T
        if expert is not None:
            weight, scale = weight[expert], scale[expert]
        in_blocks = scale.dim() > 1
        scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1) if in_blocks else scale[:, None]
        groups = x.unflatten(-1, (-1, BLOCK if self.q.activations == "group" else x.shape[-1]))
        amax = groups.abs().amax(-1, keepdim=True)
        if self.q.activation_limit:
            amax = amax.clamp(max=self.q.activation_limit)
        of_x = p[f"{name}.weight.input_scale"] if self.q.activations == "static" else amax / 448
        return (e4m3(groups / of_x) * of_x).flatten(-2) @ (weight * scale).T

    def _swiglu(self, p: Mapping[str, Tensor], x: Tensor, expert: int | None = None) -> Tensor:
        run = BLOCK if self.q is not None and self.q.weights == "block" else 1
        gate, up = self._product(p, "gate_up", x, expert).unflatten(-1, (-1, 2, run)).unbind(-2)
        return (F.silu(gate) * up).flatten(-2)

    def _mlp(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return self._product(p, "down", self._swiglu(p, x))

    def _experts(self, p: Mapping[str, Tensor], x: Tensor) -> Tensor:
        chosen, experts = (x @ p["router.weight"].T).softmax(-1).topk(self.config.experts_per_token)
        shares, y = chosen / chosen.sum(-1, keepdim=True), torch.zeros_like(x)
        for t in range(len(x)):
            for share, expert in zip(shares[t], experts[t].tolist(), strict=True):
                y[t] += share * self._product(p, "down", self._swiglu(p, x[t : t + 1], expert), expert)[0]
        return y

    def _attention(self, p: Mapping[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
        c = self.config
        qkv = self._product(p, "qkv", x) + p.get("qkv.bias", torch.zeros(1, dtype=torch.double))
        q, k, v = (
            qkv.unflatten(-1, (-1, c.head_dim)).transpose(0, 1).split((c.num_heads, c.num_kv_heads, c.num_kv_heads))
        )
        angles = positions[:, None] * p["rope.frequencies"]

        def turned(heads: Tensor) -> Tensor:
            a, b = heads.chunk(2, -1)
            return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

        k = turned(k)
        if c.scaled_kv:
            of_k, of_v = p["kv.scales"]
            k, v = e4m3(k / of_k) * of_k, e4m3(v / of_v) * of_v
        k, v = (states.repeat_interleave(c.num_heads // c.num_kv_heads, 0) for states in (k, v))
        scores = turned(q) @ k.mT / c.head_dim**0.5
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        return self._product(p, "o", attended.transpose(0, 1).flatten(1))
