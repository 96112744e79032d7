"""Qwen2 is Llama with a bias on Q, K and V."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Bias."""
    refuse_windows(hf)
    return {"qkv_bias": True}


def refuse_windows(hf: ConfigJson) -> None:
    """With `use_sliding_window`, layers from `max_window_layers` on have a window, unless `layer_types` says which."""
    if hf.flag("use_sliding_window") and hf["layer_types"] is None:
        windowed = hf["sliding_window"] is not None and hf.count("max_window_layers") < hf.repeats("num_hidden_layers")
        hf.refuse_if(windowed, f"sliding_window {hf['sliding_window']!r} of some layers")


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
)
