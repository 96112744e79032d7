"""A small model whose layers are dense and of experts by turns, and what it computes, apart from the engine's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from support.models.shapes import config
from torch import Tensor

from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.families import mixtral

LAYERS = 5
CONFIG = config("mixtral", num_layers=LAYERS, num_experts=4, vocab_size=37)


ALTERNATING = replace(
    mixtral.MIXTRAL,
    name="alternating",
    hf_class="AlternatingForCausalLM",
    layers=lambda config, tp: (decoder.layer(config, tp), *mixtral.decoder_layers(config, tp)),
    kind_of=lambda config: tuple(i % 2 for i in range(config.num_layers)),
)


def alternating() -> Model:
    """Dense in layers 0, 2, 4 ..., experts in the others."""
    made = ALTERNATING
    return Model(made.embed(CONFIG), made.layers(CONFIG, 1), made.kind_of(CONFIG), made.head(CONFIG, 1))


def logits(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """[tokens, vocabulary] of one sequence, in float64; `weights` by the engine's names."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x, positions = w["embed.weight"][ids], torch.arange(len(ids)).double()
    for i in range(LAYERS):
        p = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
        x = x + _attention(p, _norm(x, p["input_layernorm.weight"]), positions)
        y = _norm(x, p["post_attention_layernorm.weight"])
        x = x + (_experts(p, y) if i % 2 else _swiglu(y, p["gate_up.weight"]) @ p["down.weight"].T)
    return _norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).sqrt() * weight


def _swiglu(x: Tensor, gate_up: Tensor) -> Tensor:
    return F.silu(x @ gate_up[0::2].T) * (x @ gate_up[1::2].T)


def _experts(p: Mapping[str, Tensor], x: Tensor) -> Tensor:
    chosen, experts = (x @ p["router.weight"].T).softmax(-1).topk(CONFIG.experts_per_token)
    shares = chosen / chosen.sum(-1, keepdim=True)
    rows = [
        sum(
            share * (_swiglu(x[t], p["gate_up.weight"][e]) @ p["down.weight"][e].T)
            for share, e in zip(shares[t], experts[t], strict=True)
        )
        for t in range(len(x))
    ]
    return torch.stack(rows)  # type: ignore[arg-type]


def _attention(p: Mapping[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    heads, kv_heads, d = CONFIG.num_heads, CONFIG.num_kv_heads, CONFIG.head_dim
    qkv = (x @ p["qkv.weight"].T).unflatten(-1, (-1, d)).transpose(0, 1)  # [H + 2 K, tokens, d]
    q, k, v = qkv.split((heads, kv_heads, kv_heads))
    angles = positions[:, None] * p["rope.frequencies"]

    def turned(heads: Tensor) -> Tensor:
        a, b = heads.chunk(2, -1)
        return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)

    k, v = (states.repeat_interleave(heads // kv_heads, 0) for states in (turned(k), v))
    scores = turned(q) @ k.mT / d**0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return attended.transpose(0, 1).flatten(1) @ p["o.weight"].T
