"""Ministral is Mistral with its window in some layers, where config.json says in which."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import attention_kinds, decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """All layers have the window, if it is not null, unless `layer_types` says which."""
    return attention_kinds.window_fields(hf, lambda layer: True)


MINISTRAL = Architecture(
    name="ministral",
    hf_class="MinistralForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "eos_token_id": 2,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("layer_types",),
)
