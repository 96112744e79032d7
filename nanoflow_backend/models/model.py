"""This module builds the op graphs of a model's architecture."""

from __future__ import annotations

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.model import Model
from nanoflow_backend.models.registry import ARCHITECTURES


def build(config: ModelConfig, tp: int = 1) -> Model:
    """The graphs of one rank out of `tp`.

    Raises:
        ConfigError: an unknown architecture, or heads that `tp` ranks cannot share.
    """
    if config.architecture not in ARCHITECTURES:
        raise ConfigError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {config.architecture!r}")
    if config.num_heads % tp:
        raise ConfigError(f"tensor_parallel: expected a divisor of num_attention_heads {config.num_heads}, got {tp}")
    if config.num_kv_heads % tp and tp % config.num_kv_heads:
        raise ConfigError(
            f"tensor_parallel: expected a divisor or a multiple of num_key_value_heads {config.num_kv_heads}, got {tp}"
        )
    architecture = ARCHITECTURES[config.architecture]
    return Model(
        architecture.embed(config),
        architecture.layers(config, tp),
        architecture.kind_of(config),
        architecture.head(config, tp),
    )
