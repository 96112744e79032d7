"""Seed-OSS is Llama with a bias on Q, K and V, and one on the output projection, each where config.json says so."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Llama's `attention_bias` is both biases; here the second one has a key of its own."""
    return {"qkv_bias": hf.flag("attention_bias"), "o_bias": hf.flag("attention_out_bias")}


SEED_OSS = Architecture(
    name="seed_oss",
    hf_class="SeedOssForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 524288,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "eos_token_id": 2,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias",),
)
