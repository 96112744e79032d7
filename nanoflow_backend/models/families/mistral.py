"""Mistral and Mistral-Small are Llama with a sliding window of attention, or without: then they are Llama."""

from __future__ import annotations

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.families import llama

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
    fields=llama.windowed_fields,
    embed=llama.embedding,
    layers=llama.decoder_layers,
    head=llama.lm_head,
)
