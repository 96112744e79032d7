"""Mixtral is Llama with the top k of E experts for an MLP. Tensor parallelism cuts every expert (paper section 6.7)."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.builder import GraphBuilder
from nanoflow_backend.graph.operation import Graph, Source
from nanoflow_backend.models import llama
from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.config_json import MOST_REPEATS, ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Transformers reads both names of the number of experts, and gives all layers the window, if there is one."""
    hf.refuse_if(hf["sliding_window"] is not None, f"sliding_window {hf['sliding_window']!r}")
    experts = hf.agreed("num_local_experts", "num_experts")
    return {
        "num_experts": hf.integer("num_local_experts", experts, 1, MOST_REPEATS),
        "experts_per_token": hf.size("num_experts_per_tok"),
    }


def decoder_layers(config: ModelConfig, tp: int = 1) -> tuple[Graph, ...]:
    """One kind of layer."""
    return (llama.layer(config, tp, mlp=expert_mlp),)


def expert_mlp(g: GraphBuilder, config: ModelConfig, x: str) -> str:
    """sum over the chosen experts e of weight_e * w2_e(silu(w1_e(x)) * w3_e(x))."""
    moe = "model.layers.{layer}.block_sparse_moe"
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    w1_w3 = [
        Source(f"{moe}.experts.{e}.{w}.weight", (inner, hidden), shard=0) for e in range(experts) for w in ("w1", "w3")
    ]
    w2 = [Source(f"{moe}.experts.{e}.w2.weight", (hidden, inner), shard=1) for e in range(experts)]
    gate = Source(f"{moe}.gate.weight", (experts, hidden))

    logits = g.linear("router", x, g.weight("router.weight", gate), dtype="float32", quantise=False)
    chosen, weights = g.route("route", logits, config.experts_per_token)
    gate_up = g.weight("gate_up.weight", *w1_w3, interleave=2, matrices=experts)
    h = g.grouped_linear_swiglu("gate_up", x, chosen, gate_up)
    return g.grouped_combine("down", h, chosen, weights, g.weight("down.weight", *w2, matrices=experts))


MIXTRAL = Architecture(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    fields=config_fields,
    embed=llama.embedding,
    layers=decoder_layers,
    head=llama.lm_head,
)
