"""Qwen3 is Llama with an RMS norm of every head of Q and K."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson
from nanoflow_backend.models.families import qwen2


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Its windows are Qwen2's."""
    return decoder.bias_fields(hf) | qwen2.window_fields(hf) | {"qk_norm": True}


QWEN3 = Architecture(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias", "layer_types"),
)
