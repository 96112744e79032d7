"""This module builds the op graphs of a model's architecture."""

from __future__ import annotations

from msgspec.structs import replace

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.architecture import Architecture
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
    layers, kind_of = _layers(config, architecture, tp)
    return Model(architecture.embed(config), layers, kind_of, architecture.head(config, tp))


def _layers(config: ModelConfig, architecture: Architecture, tp: int) -> tuple[tuple[Graph, ...], tuple[int, ...]]:
    """A graph for each kind of layer, and the kind of each layer. Layers of one architecture's kind are of several if
    the quantization covers other weights in some than in others."""
    kind_of, quantization = architecture.kind_of(config), config.quantization
    if quantization is None or not quantization.excluded:
        return architecture.layers(config, tp), kind_of
    plain = architecture.layers(replace(config, quantization=None), tp)
    tensors = [[s.tensor for parameter in graph.parameters for s in parameter.sources] for graph in plain]
    numbers: dict[tuple[int, tuple[bool, ...]], int] = {}
    graphs: list[Graph] = []
    kinds: list[int] = []
    for layer, kind in enumerate(kind_of):
        here = replace(quantization, layer=layer)
        key = kind, tuple(here.covers(tensor) for tensor in tensors[kind])
        if key not in numbers:
            numbers[key] = len(graphs)
            graphs.append(architecture.layers(replace(config, quantization=here), tp)[kind])
        kinds.append(numbers[key])
    return tuple(graphs), tuple(kinds)
