"""fbgemm_fp8: a scale a row of the weights, and one a token of activations, found from what is below a bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import convert
from nanoflow_backend.config.quantization import Quantization
from nanoflow_backend.models.quantization.modules import prefixes_and_suffixes
from nanoflow_backend.models.quantization.tensor_names import WEIGHT_SCALE


class _Json(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    quant_method: str
    activation_scale_ub: float = 1200.0
    modules_to_not_convert: tuple[str, ...] = ()


def read(given: Mapping[str, Any], origin: str) -> Quantization:
    """Raises: ConfigError, a bound that is no positive number."""
    json = convert(given, _Json, origin)
    if not 0 < json.activation_scale_ub < math.inf:
        raise ConfigError(f"{origin}: activation_scale_ub: expected a number > 0, got {json.activation_scale_ub}")
    return Quantization(
        method="fbgemm_fp8",
        weights="channel",
        activations="token",
        activation_limit=json.activation_scale_ub,
        excluded=prefixes_and_suffixes(json.modules_to_not_convert, origin),
        weight_scale=WEIGHT_SCALE,
    )
