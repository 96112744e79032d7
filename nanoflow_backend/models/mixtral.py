"""Mixtral: Llama whose MLP is the top k of E experts. Tensor parallelism cuts every expert (paper section 6.7)."""

from __future__ import annotations

from nanoflow_backend.config import ModelConfig
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.operation import Graph, Source
from nanoflow_backend.models import llama
from nanoflow_backend.models.llama import embed, head

__all__ = ["embed", "head", "layer"]


def layer(config: ModelConfig, tp: int = 1) -> Graph:
    return llama.layer(config, tp, mlp=expert_mlp)


def expert_mlp(g: GraphBuilder, config: ModelConfig, x: str) -> str:
    """sum over the chosen experts e of weight_e * w2_e(silu(w1_e(x)) * w3_e(x))."""
    moe = "model.layers.{layer}.block_sparse_moe"
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    w1_w3 = [
        Source(f"{moe}.experts.{e}.{w}.weight", (inner, hidden), shard=0) for e in range(experts) for w in ("w1", "w3")
    ]
    w2 = [Source(f"{moe}.experts.{e}.w2.weight", (hidden, inner), shard=1) for e in range(experts)]
    gate = Source(f"{moe}.gate.weight", (experts, hidden))

    logits = g.linear("router", x, g.weight("router.weight", gate), dtype="float32")
    chosen, weights = g.route("route", logits, config.experts_per_token)
    gate_up = g.weight("gate_up.weight", *w1_w3, interleave=2, matrices=experts)
    h = g.grouped_linear_swiglu("gate_up", x, chosen, gate_up)
    return g.grouped_combine("down", h, chosen, weights, g.weight("down.weight", *w2, matrices=experts))
