"""ModelOpt: a file of its own, hf_quant_config.json, and the same in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from nanoflow_backend.config.file import convert
from nanoflow_backend.config.quantization import Quantization
from nanoflow_backend.models.config_json import agreed
from nanoflow_backend.models.quantization.modules import wildcards
from nanoflow_backend.models.quantization.refusal import refuse
from nanoflow_backend.models.quantization.tensor_names import KV_SCALES, WEIGHT_SCALE

OWN_FILE = "hf_quant_config.json"
ALGORITHMS: dict[str, tuple[Literal["tensor", "channel"], Literal["static", "token"]]] = {  # of weights, of activations
    "FP8": ("tensor", "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": ("channel", "token"),
}


class _Json(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quant_algo: str
    exclude_modules: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()  # the same, in config.json
    kv_cache_quant_algo: str | None = None
    kv_cache_scheme: dict[str, Any] | str | None = None  # the same, in config.json
    quant_method: str = "modelopt"
    producer: Any = None
    config_groups: Any = None  # what quant_algo means, once more
    group_size: Any = None  # of formats of 4 bits


def read(given: Mapping[str, Any], origin: str) -> Quantization:
    """Of either file: the older form of config.json nests its keys as the own file does.

    Raises:
        ConfigError: another algorithm than FP8, or a key that says more than is computed here.
    """
    nested = given.get("quantization")
    if isinstance(nested, Mapping):
        given = {**{key: value for key, value in given.items() if key != "quantization"}, **nested}
    algorithm = given.get("quant_algo")
    if algorithm not in list(ALGORITHMS):
        refuse(origin, f"quant_algo {algorithm!r}")
    json = convert(given, _Json, origin)
    listed = agreed(given, ("ignore", "exclude_modules"), origin) or ()
    weights, activations = ALGORITHMS[json.quant_algo]
    return Quantization(
        method="modelopt",
        weights=weights,
        activations=activations,
        excluded=wildcards(listed, origin),
        weight_scale=WEIGHT_SCALE,
        kv_scales=KV_SCALES if _has_kv_scales(json, origin) else None,
    )


def _has_kv_scales(json: _Json, origin: str) -> bool:
    scheme = json.kv_cache_quant_algo or json.kv_cache_scheme
    if isinstance(scheme, dict):
        is_fp8 = (scheme.get("num_bits"), scheme.get("type"), scheme.get("dynamic", False)) == (8, "float", False)
    else:
        is_fp8 = scheme in (None, "FP8")
    if not is_fp8:
        refuse(origin, f"KV cache quantization {scheme!r}")
    return scheme is not None
