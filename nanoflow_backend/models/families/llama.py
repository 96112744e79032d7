"""Llama-2 and -3 with their relatives (DeepSeek-67B, Yi)."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Biases. The class has no window of attention: one that is asked for all the same is refused."""
    hf.refuse_if(hf["sliding_window"] is not None, f"sliding_window {hf['sliding_window']!r}")
    return decoder.bias_fields(hf)


LLAMA = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    defaults={
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
    honours=("attention_bias",),
)
