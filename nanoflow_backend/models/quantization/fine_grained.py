"""`fp8`: fine-grained FP8 of transformers, in blocks, and its relative with one scale a tensor, of AutoFP8 and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from nanoflow_backend.config.file import convert
from nanoflow_backend.config.quantization import BLOCK, Quantization
from nanoflow_backend.models.config_json import agreed
from nanoflow_backend.models.quantization.compressed_tensors import say_per_token
from nanoflow_backend.models.quantization.modules import prefixes_and_suffixes
from nanoflow_backend.models.quantization.refusal import refuse
from nanoflow_backend.models.quantization.tensor_names import KV_SCALES, WEIGHT_SCALE, WEIGHT_SCALE_INV


class _Json(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quant_method: str
    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: tuple[int, int] | None = None  # None: a scale a tensor
    fmt: str = "e4m3"
    scale_fmt: str = "float"
    expert_dtype: str = "fp8"
    modules_to_not_convert: tuple[str, ...] = ()
    ignored_layers: tuple[str, ...] = ()  # vLLM's and AutoFP8's name for the same
    modules_to_convert: tuple[str, ...] = ()  # beside linear layers: embeddings
    kv_cache_scheme: Literal["static"] | None = None  # AutoFP8's
    dequantize: Any = None  # how transformers is to compute


def read(given: Mapping[str, Any], origin: str) -> Quantization:
    """Raises: ConfigError, a key with another value than is computed here."""
    json = convert(given, _Json, origin)
    for key, only in (("fmt", "e4m3"), ("scale_fmt", "float"), ("expert_dtype", "fp8"), ("modules_to_convert", ())):
        if (value := getattr(json, key)) != only:
            refuse(origin, f"{key} {value!r}")
    in_blocks, is_static = json.weight_block_size is not None, json.activation_scheme == "static"
    if json.weight_block_size not in (None, (BLOCK, BLOCK)):
        refuse(origin, f"weight_block_size {list(json.weight_block_size or ())} (only {[BLOCK, BLOCK]})")
    if in_blocks and is_static:
        refuse(origin, f"activation_scheme 'static' with weight_block_size {[BLOCK, BLOCK]}")
    if not in_blocks and not is_static:
        say_per_token(origin)
    listed = agreed(given, ("modules_to_not_convert", "ignored_layers"), origin) or ()
    return Quantization(
        method="fp8",
        weights="block" if in_blocks else "tensor",
        activations="group" if in_blocks else "static" if is_static else "token",
        excluded=prefixes_and_suffixes(listed, origin),
        weight_scale=WEIGHT_SCALE_INV if in_blocks else WEIGHT_SCALE,
        kv_scales=KV_SCALES if json.kv_cache_scheme else None,
    )
