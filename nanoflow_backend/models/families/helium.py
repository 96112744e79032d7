"""Helium is Llama whose rotation turns neighbouring dimensions as pairs, with a bias on Q, K and V if asked for."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Biases and pairs. The output projection is square, so heads have just the hidden size together."""
    width = hf.size("head_dim") * hf.size("num_attention_heads")
    hf.refuse_if(width != hf.size("hidden_size"), f"hidden_size {hf['hidden_size']} of heads with {width} together")
    return {"qkv_bias": hf.flag("attention_bias"), "rotates_neighbours": True}


HELIUM = Architecture(
    name="helium",
    hf_class="HeliumForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 20,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-8,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias",),
)
