"""Architecture is what this engine knows of one of transformers' model classes; each has a file in `families`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.blocks import attention_kinds
from nanoflow_backend.models.config_json import ConfigJson


@dataclass(frozen=True)
class Architecture:
    """A family of models: the name that config.json has for it, what its keys mean, and its graphs of one rank.

    `defaults` are what a key means that config.json leaves out: the default of the config class in transformers (4.57
    and 5.23 agree). Sizes of matrices are not among them, since nobody leaves those to a default.
    """

    name: str  # ModelConfig.architecture
    hf_class: str  # in config.json's `architectures`
    defaults: Mapping[str, Any]
    fields: Callable[[ConfigJson], dict[str, Any]]  # of ModelConfig, that not every architecture has
    embed: Callable[[ModelConfig], Graph]
    layers: Callable[[ModelConfig, int], tuple[Graph, ...]]  # config, ranks -> a graph for each kind of layer
    head: Callable[[ModelConfig, int], Graph]  # config, ranks
    kind_of: Callable[[ModelConfig], tuple[int, ...]] = attention_kinds.kind_of  # of each layer
    honours: tuple[str, ...] = ()  # keys that models.hugging_face refuses of classes that do not name them here
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # see models.fused

    @property
    def wholes(self) -> tuple[tuple[str, str], ...]:
        """Linear layers that every checkpoint has in one with others, each with that one."""
        modules = {whole.removesuffix(".weight"): parts for whole, parts in self.fused.items() if len(parts) > 1}
        parts = [(part, whole) for whole, parts in modules.items() for part in parts if "{expert}" not in part]
        return tuple((part.removesuffix(".weight"), whole) for part, whole in parts)
