"""Mistral and Mistral-Small are Llama with a sliding window of attention, or without: then they are Llama."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson


def windowed_fields(hf: ConfigJson) -> dict[str, Any]:
    """Of classes that give all layers the window, if it is not null."""
    return {"sliding_window": 0 if hf["sliding_window"] is None else hf.size("sliding_window")}


MISTRAL = Architecture(
    name="mistral",
    hf_class="MistralForCausalLM",
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
    fields=windowed_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
)
