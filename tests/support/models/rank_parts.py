"""What every rank should hold of a model, from the modules that transformers made."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def pieces(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
    """`count` equal pieces along `dim`, the last ones filled up with zeros."""
    size = -(-tensor.shape[dim] // count)
    padding = torch.zeros_like(tensor).narrow(dim, 0, size * count - tensor.shape[dim])
    return list(torch.cat((tensor, padding), dim).split(size, dim))


def take_turns(gate: Tensor, up: Tensor, run: int = 1) -> Tensor:
    """`run` rows of each [..., rows, columns]."""
    in_runs = [matrix.unflatten(-2, (-1, run)) for matrix in (gate, up)]
    return torch.stack(in_runs, -3).flatten(-4, -2)


def expected(model: PreTrainedModel, rank: int, tp: int, run: int = 1) -> dict[str, Tensor]:
    """The layer-0 weights, embeddings and head of one rank, from the model's own modules.

    `run` rows of gate and of up take turns.
    """
    layer = model.model.layers[0]
    attention, kv_heads = layer.self_attn, model.config.num_key_value_heads
    q_heads = model.config.num_attention_heads
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
    projections = ((attention.q_proj, q_heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads))
    state["layers.0.qkv.weight"] = torch.cat([heads(p.weight, n) for p, n in projections])
    if attention.q_proj.bias is not None:
        state["layers.0.qkv.bias"] = torch.cat([heads(p.bias, n) for p, n in projections])
    if model.config.model_type == "mixtral":
        experts = layer.mlp.experts
        gate, up = experts.gate_up_proj.data.chunk(2, 1)
        state["layers.0.router.weight"] = layer.mlp.gate.weight.data
        state["layers.0.gate_up.weight"] = take_turns(pieces(gate, tp, 1)[rank], pieces(up, tp, 1)[rank], run)
        state["layers.0.down.weight"] = pieces(experts.down_proj.data, tp, 2)[rank]
    else:
        mlp = layer.mlp
        gate_up = [pieces(p.weight.data, tp, 0)[rank] for p in (mlp.gate_proj, mlp.up_proj)]
        state["layers.0.gate_up.weight"] = take_turns(*gate_up, run)
        state["layers.0.down.weight"] = pieces(mlp.down_proj.weight.data, tp, 1)[rank]
    return state
