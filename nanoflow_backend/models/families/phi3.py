"""Phi-3 and Phi-4 are Llama; their checkpoints have Q, K and V in one tensor, and gate and up in another."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson
from nanoflow_backend.models.families import mistral

LAYER = "model.layers.{layer}"


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """The only scaling that the class has is longrope, which it also reads where a file says yarn."""
    for scaling in (hf["rope_parameters"] or {}, hf["rope_scaling"] or {}):
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        hf.refuse_if(kind not in ("default", "longrope", "su"), f"rope scaling {kind!r} of this class")
    return mistral.windowed_fields(hf)


PHI3 = Architecture(
    name="phi3",
    hf_class="Phi3ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 32000,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("partial_rotary_factor",),
    fused={
        f"{LAYER}.self_attn.qkv_proj.weight": tuple(f"{LAYER}.self_attn.{p}_proj.weight" for p in "qkv"),
        f"{LAYER}.mlp.gate_up_proj.weight": tuple(f"{LAYER}.mlp.{p}_proj.weight" for p in ("gate", "up")),
    },
)
