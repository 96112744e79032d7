"""compressed-tensors, which llm-compressor writes: config groups with the arguments of weights and activations."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import msgspec

from nanoflow_backend.config.file import convert
from nanoflow_backend.config.quantization import BLOCK, Quantization
from nanoflow_backend.models.quantization.modules import names_and_patterns, others_than
from nanoflow_backend.models.quantization.refusal import refuse
from nanoflow_backend.models.quantization.tensor_names import KV_SCALES, WEIGHT_SCALE

FORMATS = ("float-quantized", "naive-quantized")  # both store e4m3 as it is

log = logging.getLogger(__name__)


class _Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """QuantizationArgs. Observers, dtypes of scales and the order of columns are of the past: tensors tell the rest."""

    num_bits: int = 8
    type: str = "int"
    strategy: str | None = None
    symmetric: bool = True
    dynamic: bool | str = False
    group_size: int | None = None
    block_structure: list[int] | str | None = None
    actorder: Any = None
    observer: Any = None
    observer_kwargs: Any = None
    scale_dtype: Any = None
    zp_dtype: Any = None

    @property
    def granularity(self) -> str:
        """The strategy, or what the library means where there is none."""
        return self.strategy or ("token" if self.dynamic else "tensor")


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    targets: tuple[str, ...]
    weights: _Arguments | None = None
    input_activations: _Arguments | None = None
    output_activations: _Arguments | None = None
    format: str | None = None


class _Json(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quant_method: str
    config_groups: dict[str, _Group] = {}
    format: str = FORMATS[0]
    ignore: tuple[str, ...] = ()
    kv_cache_scheme: _Arguments | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    quantization_status: Any = None
    global_compression_ratio: Any = None
    version: Any = None


def read(given: Mapping[str, Any], origin: str) -> Quantization:
    """All groups must be quantised alike. Without a group, only the KV cache is.

    Raises:
        ConfigError: what is not FP8, or not one of the combinations that are computed here, by its key.
    """
    json = convert(given, _Json, origin)
    if json.format not in FORMATS and not (json.format == "mixed-precision" and len(json.config_groups) > 1):
        refuse(origin, f"format {json.format!r}")
    if json.transform_config:
        refuse(origin, "transform_config (products of rotated weights)")
    if (json.sparsity_config or {}).get("format", "dense") != "dense":
        refuse(origin, f"sparsity_config (format {(json.sparsity_config or {})['format']!r})")
    schemes = {name: _scheme(group, f"{origin}: config_groups.{name}") for name, group in json.config_groups.items()}
    if len(set(schemes.values())) > 1:
        refuse(origin, f"config_groups: {', '.join(schemes)} that are quantised in different ways")
    targets = [target for group in json.config_groups.values() for target in group.targets]
    weights, activations = next(iter(schemes.values()), ("tensor", "token"))
    return Quantization(
        method="compressed-tensors",
        weights=weights,
        activations=activations,
        excluded=names_and_patterns(json.ignore, f"{origin}: ignore") + others_than(targets, f"{origin}: targets"),
        weight_scale=WEIGHT_SCALE,
        kv_scales=_kv_scales(json.kv_cache_scheme, f"{origin}: kv_cache_scheme"),
    )


def _scheme(
    group: _Group, origin: str
) -> tuple[Literal["tensor", "channel", "block"], Literal["token", "group", "static"]]:
    """What the scales of a group's weights and activations cover."""
    weights, activations = group.weights, group.input_activations
    if group.format not in (None, *FORMATS):
        refuse(origin, f"format {group.format!r}")
    if weights is None or activations is None:
        refuse(origin, "FP8 for only one of weights and input_activations")
    if group.output_activations is not None:
        refuse(origin, "output_activations")
    for name, arguments in (("weights", weights), ("input_activations", activations)):
        _require_fp8(arguments, f"{origin}.{name}")
    if weights.dynamic:
        refuse(f"{origin}.weights", f"dynamic {weights.dynamic!r}")
    if weights.granularity == "block" and weights.block_structure not in ([BLOCK, BLOCK], f"{BLOCK}x{BLOCK}"):
        refuse(f"{origin}.weights", f"block_structure {weights.block_structure!r} (only {[BLOCK, BLOCK]})")
    match weights.granularity, activations.granularity, activations.dynamic:
        case "tensor" | "channel" as of_weights, "token", True:
            return of_weights, "token"
        case "tensor" | "channel" as of_weights, "tensor", True:
            say_per_token(origin)
            return of_weights, "token"
        case "tensor" | "channel" as of_weights, "tensor", False:
            return of_weights, "static"
        case "block", "group", True if activations.group_size == BLOCK:
            return "block", "group"
    size = "" if activations.group_size is None else f" of {activations.group_size}"
    refuse(
        origin,
        f"strategy {weights.granularity!r} of weights with {activations.granularity!r}{size}, dynamic "
        f"{activations.dynamic!r}, of input_activations",
    )


def _require_fp8(arguments: _Arguments, origin: str) -> None:
    if (arguments.num_bits, arguments.type) != (8, "float"):
        refuse(origin, f"{arguments.num_bits}-bit {arguments.type}")
    if not arguments.symmetric:
        refuse(origin, "symmetric false")


def _kv_scales(scheme: _Arguments | None, origin: str) -> tuple[str, str] | None:
    if scheme is None:
        return None
    _require_fp8(scheme, origin)
    if scheme.granularity != "tensor" or scheme.dynamic:
        refuse(origin, f"strategy {scheme.granularity!r}, dynamic {scheme.dynamic!r} (only one static scale a layer)")
    return KV_SCALES


@cache  # a process reads config.json several times, and says this once
def say_per_token(origin: str) -> None:
    """Log how dynamic scales of a whole batch are computed here."""
    log.info("%s: dynamic scales per tensor are computed per token: tokens must not depend on their batch", origin)
