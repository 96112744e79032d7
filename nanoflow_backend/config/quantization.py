"""Quantization says which products of a model are computed in FP8 (e4m3), and what their scales cover."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

FP8: Literal["float8_e4m3fn"] = (
    "float8_e4m3fn"  # 4 bits of exponent, 3 of mantissa, no infinity; the largest value is 448
)
BLOCK = 128  # rows and columns of a weight, or columns of an activation, that share a scale

EVERYTHING = "re:"  # in `excluded`: what every name begins with


class Quantization(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The linear layers of a model whose weights and inputs are e4m3, each with fp32 scales that multiply.

    A scale of `weights` covers a whole tensor of the checkpoint, a row of it, or BLOCK x BLOCK. One of `activations`
    covers a row (a token, found as it comes), BLOCK columns of a row (found as they come), or all (static: read from
    the checkpoint). Dynamic scales of all tokens of a batch together are not among them: a token's result would depend
    on its neighbours.
    """

    method: str  # quant_method in config.json; "fp8" where weights are quantised as they are loaded
    weights: Literal["tensor", "channel", "block"] = "channel"
    activations: Literal["token", "group", "static"] = "token"
    activation_limit: float = 0.0  # the largest magnitude that a dynamic scale is found from; 0: none
    excluded: tuple[str, ...] = ()  # modules that stay as they are: full names, or "re:" and a pattern for their start
    weight_scale: str = "weight_scale"  # the scale's tensor of a module
    kv_scales: tuple[str, str] | None = None  # the tensors of K's and V's scale of a layer's module; None: it has none
    wholes: tuple[tuple[str, str], ...] = ()  # modules with the one that a checkpoint, and `excluded`, has them in
    at_load: bool = False  # the checkpoint is not quantised: scales are found while its weights are read
    layer: int = 0  # that "{layer}" stands for

    @property
    def is_of_pages_alone(self) -> bool:
        """No weight is quantised, whatever its name."""
        return EVERYTHING in self.excluded

    def covers(self, tensor: str) -> bool:
        """Whether this weight, "{module}.weight" with {layer} where it has one, is quantised."""
        part = tensor.removesuffix(".weight")
        module = dict(self.wholes).get(part, part).replace("{layer}", str(self.layer))
        return not any(
            re.match(pattern.removeprefix("re:"), module) if pattern.startswith("re:") else pattern == module
            for pattern in self.excluded
        )


AT_LOAD = Quantization(method="fp8", at_load=True)  # engine.json's "quantization": "fp8"
