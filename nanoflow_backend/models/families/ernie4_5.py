"""ERNIE-4.5 (dense) is Llama whose rotation turns neighbouring dimensions as pairs."""

from __future__ import annotations

from typing import Any

from nanoflow_backend.models.architecture import Architecture
from nanoflow_backend.models.blocks import decoder
from nanoflow_backend.models.config_json import ConfigJson


def config_fields(hf: ConfigJson) -> dict[str, Any]:
    """Its biases would be in the MLP, too."""
    hf.refuse_if(hf.flag("use_bias"), "use_bias")
    return {"rotates_neighbours": True}


ERNIE4_5 = Architecture(
    name="ernie4_5",
    hf_class="Ernie4_5ForCausalLM",
    defaults={
        "hidden_act": "silu",
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    },
    fields=config_fields,
    embed=decoder.embedding,
    layers=decoder.decoder_layers,
    head=decoder.lm_head,
)
