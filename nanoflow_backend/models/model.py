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
        raise ConfigError(f"tensor_parallel: expected a divisor of num_attention_heads {config.num_heads}, got {tp}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ConfigError(
            f"tensor_parallel: expected a divisor or a multiple of num_key_value_heads {config.num_kv_heads}, got {tp}"
        )
    architecture = ARCHITECTURES[config.architecture]
    return Model(
        architecture.embed(config), architecture.layer(config, tp), architecture.head(config, tp), config.num_layers
    )
