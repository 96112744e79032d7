"""GLM-4 (9B) is Llama with a bias on Q, K and V; it rotates half of each head, neighbouring dimensions as pairs."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson

MLP = "model.layers.{layer}.mlp"


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Biases and pairs."""
    return {"qkv_bias": hf.flag("attention_bias"), "rotates_neighbours": True}


GLM = Architecture(
    name="glm",
    hf_class="GlmForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1.5625e-7,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias", "partial_rotary_factor"),
    fused={f"{MLP}.gate_up_proj.weight": (f"{MLP}.gate_proj.weight", f"{MLP}.up_proj.weight")},
)
