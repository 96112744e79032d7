"""What every rank should hold of a model, from the modules that transformers made."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

ROTATE_NEIGHBOURS = ("glm", "ernie4_5", "helium")


def pieces(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """`count` equal pieces along `dim`, the last ones filled up with zeros."""
    size = -(-tensor.shape[dim] // count)
    padding = torch.zeros_like(tensor).narrow(dim, 0, size * count - tensor.shape[dim])
    return list(torch.cat((tensor, padding), dim).split(size, dim))


def take_turns(gate: Tensor, up: Tensor, run: int = 1) -> Tensor:
    """`run` rows of each [..., rows, columns]."""
    in_runs = [matrix.unflatten(-2, (-1, run)) for matrix in (gate, up)]
    return torch.stack(in_runs, -3).flatten(-4, -2)


def neighbours_apart(tensor: Tensor, head_dim: int, rotated: int) -> Tensor:
    """Of each head the rows 0, 2, ..., then 1, 3, ... of those that are rotated, then the others."""
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]
    return torch.cat([head[order] for head in tensor.split(head_dim)])


def expected(model: PreTrainedModel, rank: int, tp: int, run: int = 1) -> dict[str, Tensor]:
    """The layer-0 weights, embeddings and head of one rank, from the model's own modules.

    `run` rows of gate and of up take turns.
    """
    layer = model.model.layers[0]
    attention, kv_heads = layer.self_attn, model.config.num_key_value_heads
    q_heads = model.config.num_attention_heads
    head_dim = attention.head_dim
    copies = max(tp // kv_heads, 1)

    def heads(parameter: Tensor, units: int) -> Tensor:
        return pieces(parameter.data, min(tp, units), 0)[rank // copies if units < tp else rank]

    state = {
        "embed.weight": model.get_input_embeddings().weight.data,
        "norm.weight": model.model.norm.weight.data,
        "lm_head.weight": pieces(model.get_output_embeddings().weight.data, tp, 0)[rank],
        "layers.0.input_layernorm.weight": layer.input_layernorm.weight.data,
        "layers.0.post_attention_layernorm.weight": layer.post_attention_layernorm.weight.data,
        "layers.0.o.weight": pieces(attention.o_proj.weight.data, tp, 1)[rank],
    }
    if attention.o_proj.bias is not None:
        state["layers.0.o.bias"] = attention.o_proj.bias.data * (rank == 0)  # ranks' products are added up
    counts = (q_heads, kv_heads, kv_heads)
    if model.config.model_type == "phi3":
        qkv = attention.qkv_proj.weight.split([head_dim * n for n in counts])
    else:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        share = model.config.rope_parameters.get("partial_rotary_factor", 1)
        rotated = int(share * head_dim) if model.config.model_type in ROTATE_NEIGHBOURS else 0
        of_projections = (rotated, rotated, 0)
        qkv = [neighbours_apart(p.weight, head_dim, r) for p, r in zip(projections, of_projections, strict=True)]
        if attention.q_proj.bias is not None:
            biases = [neighbours_apart(p.bias, head_dim, r) for p, r in zip(projections, of_projections, strict=True)]
            state["layers.0.qkv.bias"] = torch.cat([heads(bias, n) for bias, n in zip(biases, counts, strict=True)])
    state["layers.0.qkv.weight"] = torch.cat([heads(p, n) for p, n in zip(qkv, counts, strict=True)])
    if model.config.model_type.startswith("qwen3"):
        state["layers.0.q_norm.weight"] = attention.q_norm.weight.data
        state["layers.0.k_norm.weight"] = attention.k_norm.weight.data
    if hasattr(layer.mlp, "experts"):
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.data.chunk(2, 1)
        state["layers.0.router.weight"] = layer.mlp.gate.weight.data
        state["layers.0.gate_up.weight"] = take_turns(pieces(gate, tp, 1)[rank], pieces(up, tp, 1)[rank], run)
        state["layers.0.down.weight"] = pieces(experts.down_proj.data, tp, 2)[rank]
    else:
        mlp = layer.mlp
        is_fused = hasattr(mlp, "gate_up_proj")
        halves = (
            mlp.gate_up_proj.weight.data.chunk(2) if is_fused else (mlp.gate_proj.weight.data, mlp.up_proj.weight.data)
        )
        state["layers.0.gate_up.weight"] = take_turns(*(pieces(half, tp, 0)[rank] for half in halves), run)
        state["layers.0.down.weight"] = pieces(mlp.down_proj.weight.data, tp, 1)[rank]
    return state
