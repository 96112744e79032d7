"""build: the op graphs of a model's architecture."""

from __future__ import annotations

from nanoflow_backend.config import ConfigError, ModelConfig
from nanoflow_backend.graph.operation import Model
from nanoflow_backend.models import llama, mixtral, qwen2

ARCHITECTURES = {"llama": llama, "qwen2": qwen2, "mixtral": mixtral}


def build(config: ModelConfig, tp: int = 1) -> Model:
    """The graphs of one rank out of `tp`.

    Raises:
        ConfigError: heads that `tp` ranks cannot share.
    """
    if config.num_heads % tp:
        raise ConfigError(f"num_attention_heads {config.num_heads} cannot be shared by {tp} ranks")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ConfigError(f"num_key_value_heads {config.num_kv_heads} can be neither cut nor copied over {tp} ranks")
    architecture = ARCHITECTURES[config.architecture]
    return Model(
        architecture.embed(config), architecture.layer(config, tp), architecture.head(config, tp), config.num_layers
    )
