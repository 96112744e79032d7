"""read_computed reads a model as an engine computes it: config.json, and what engine.json says about precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.models.hugging_face import read_model_config


def read_computed(config: EngineConfig, device: Literal["cpu", "cuda"]) -> tuple[EngineConfig, ModelConfig]:
    """The configuration, with KV pages in FP8 where that is left open and the checkpoint has scales; and its model, for
    contexts as long as the configuration lets them be.

    A checkpoint that is in FP8 stays as it is with `quantization` "fp8", too.

    Raises:
        ConfigError: what is wrong with the folder, with the precision on this device, or with `max_model_tokens`.
    """
    model = read_model_config(Path(config.model))
    model = replace(model, max_model_tokens=_max_model_tokens(config, model))
    kv_scales = None if model.quantization is None else model.quantization.kv_scales
    if config.quantization == "fp8" and (model.quantization is None or model.quantization.is_of_pages_alone):
        model = replace(model, quantization=replace(AT_LOAD, kv_scales=kv_scales))
    if config.kv_cache_dtype == "auto" and kv_scales is not None:
        config = replace(config, kv_cache_dtype="fp8_e4m3")
    return config, replace(model, scaled_kv=config.precision_on(device).kv == FP8)


def _max_model_tokens(config: EngineConfig, model: ModelConfig) -> int:
    """With longrope it is the first context unless more is asked for: short requests are the worse for longer ones."""
    if config.max_model_tokens is None:
        first = model.rope.original_max_positions if model.rope.scaling == "longrope" else model.max_model_tokens
        return min(first, model.max_model_tokens)
    if config.max_model_tokens > model.max_model_tokens:
        raise ConfigError(
            f"max_model_tokens: expected at most {model.max_model_tokens} (the model's max_position_embeddings, "
            f"stretched if its rope scaling is yarn), got {config.max_model_tokens}"
        )
    return config.max_model_tokens
