"""Mixtral is Llama with the top k of E experts for an MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder, experts
from nanoflow_backend.models.config_json import ConfigJson
from nanoflow_backend.models.families import mistral

NAMES = experts.ExpertNames("block_sparse_moe", "w1", "w3", "w2")


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Experts of the model's only intermediate size."""
    inner = {"moe_intermediate_size": hf.size("intermediate_size")}
    return experts.config_fields(hf) | mistral.windowed_fields(hf) | inner


def decoder_layers(config: ModelConfig, tp: int = 1) -> tuple[Graph, ...]:
    """One kind of layer."""
    return (decoder.layer(config, tp, mlp=partial(experts.expert_mlp, names=NAMES)),)


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
    embed=decoder.embedding,
    layers=decoder_layers,
    head=decoder.lm_head,
    fused=NAMES.fused,
)
