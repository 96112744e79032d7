"""Qwen2 is Llama with a bias on Q, K and V."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import attention_kinds, decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Bias, and windows."""
    return window_fields(hf) | {"qkv_bias": True}


def window_fields(hf: ConfigJson) -> dict[str, Any]:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window, unless `layer_types` says which."""
    used = hf.flag("use_sliding_window")
    return attention_kinds.window_fields(hf, lambda layer: layer >= hf.count("max_window_layers"), used=used)


QWEN2 = Architecture(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 32,
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
    honours=("layer_types",),
)
