"""Qwen3-MoE is Qwen3 with experts in all layers, or in some: the others are dense."""

from __future__ import annotations

from functools import partial
from typing import Any

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder, experts
from nanoflow_backend.models.config_json import ConfigJson
from nanoflow_backend.models.families import mistral

NAMES = experts.ExpertNames("mlp", "gate_proj", "up_proj", "down_proj")


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Layers of `mlp_only_layers` are dense, and of the others all but every `decoder_sparse_step`th."""
    listed, every = hf.token_ids("mlp_only_layers", hf["mlp_only_layers"]), hf.size("decoder_sparse_step")
    layers = range(hf.repeats("num_hidden_layers"))
    windows = mistral.windowed_fields(hf) if hf.flag("use_sliding_window") else {}
    own = {
        "qk_norm": True,
        "moe_intermediate_size": hf.size("moe_intermediate_size"),
        "norm_topk_prob": hf.flag("norm_topk_prob"),
        "dense_layers": tuple(i for i in layers if i in listed or (i + 1) % every),
    }
    return experts.config_fields(hf) | decoder.bias_fields(hf) | windows | own


def decoder_layers(config: ModelConfig, tp: int = 1) -> tuple[Graph, ...]:
    """With experts; and dense, where some layers are."""
    sparse = decoder.layer(config, tp, mlp=partial(experts.expert_mlp, names=NAMES))
    return (sparse, decoder.layer(config, tp)) if config.dense_layers else (sparse,)


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias",),
    kind_of=lambda config: tuple(int(i in config.dense_layers) for i in range(config.num_layers)),
    fused=NAMES.fused,
)
