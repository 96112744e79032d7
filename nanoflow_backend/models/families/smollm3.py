"""SmolLM3 is Llama without rotation in some layers, every fourth one unless config.json lists them."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import attention_kinds, decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """`no_rope_layers` has a 1 for each layer that rotates, and a 0 for each that does not: these may have windows."""
    layers, rotated = range(hf.repeats("num_hidden_layers")), hf["no_rope_layers"]
    if rotated is None:
        rotated = [int((layer + 1) % hf.size("no_rope_layer_interval") != 0) for layer in layers]
    if not isinstance(rotated, list) or len(rotated) < len(layers) or any(flag not in (0, 1) for flag in rotated):
        hf.refuse(f"no_rope_layers: expected 0 or 1 for every layer ({len(layers)}), got {rotated!r}")
    unrotated = tuple(layer for layer in layers if not rotated[layer])
    windows = attention_kinds.window_fields(hf, unrotated.__contains__, used=hf.flag("use_sliding_window"))
    return decoder.bias_fields(hf) | windows | {"unrotated_layers": unrotated}


SMOLLM3 = Architecture(
    name="smollm3",
    hf_class="SmolLM3ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "eos_token_id": 128001,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias", "layer_types"),
)
