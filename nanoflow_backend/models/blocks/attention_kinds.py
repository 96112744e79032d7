"""What attention does in some layers of a model and not in others: a window, and rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.models.config_json import ConfigJson

FULL, WINDOWED = "full_attention", "sliding_attention"


class AttentionKind(NamedTuple):
    """Of one layer."""

    window: int  # keys that a token attends to, its own among them; 0: all
    is_rotated: bool  # queries and keys; without (NoPE), attention knows of positions only what comes before what


def attention_of_layers(config: ModelConfig) -> list[AttentionKind]:
    """Of each layer. A window that no request outgrows is none."""
    window = config.sliding_window if config.sliding_window < config.max_model_tokens else 0
    return [
        AttentionKind(0 if layer in config.full_attention_layers else window, layer not in config.unrotated_layers)
        for layer in range(config.num_layers)
    ]


def attention_kinds(config: ModelConfig) -> tuple[AttentionKind, ...]:
    """Each kind once, in the order in which layers have them."""
    return tuple(dict.fromkeys(attention_of_layers(config)))


def kind_of(config: ModelConfig) -> tuple[int, ...]:
    """The number of each layer's kind among `attention_kinds`."""
    kinds = attention_kinds(config)
    return tuple(kinds.index(kind) for kind in attention_of_layers(config))


def window_fields(hf: ConfigJson, by_default: Callable[[int], bool], *, used: bool = True) -> dict[str, Any]:
    """Of classes whose layers have `sliding_window` where `layer_types` says so; if it is absent, `by_default`(layer).

    No layer has one if `sliding_window` is null, or if config.json says that it is not `used`.

    Raises:
        ConfigError: `layer_types` is no list of such words, or asks for a window where there is none.
    """
    layers = range(hf.repeats("num_hidden_layers"))
    window = hf.size("sliding_window") if used and hf["sliding_window"] is not None else 0
    types = hf["layer_types"]
    if types is None:
        types = [WINDOWED if window and by_default(layer) else FULL for layer in layers]
    if not isinstance(types, list) or len(types) != len(layers) or any(word not in (FULL, WINDOWED) for word in types):
        hf.refuse(f"layer_types: expected {FULL} or {WINDOWED} for every layer ({len(layers)}), got {types!r}")
    if WINDOWED not in types:
        return {}
    if not window:
        hf.refuse(f"layer_types has {WINDOWED}, and sliding_window is null or not used (use_sliding_window)")
    return {"sliding_window": window, "full_attention_layers": tuple(i for i in layers if types[i] == FULL)}
