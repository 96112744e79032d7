"""Checks of gemm_small_m under tilings of every kind, the same in the interpreter and on a device."""

from __future__ import annotations

import torch
from nanoflow_kernels import reference
from nanoflow_kernels.gemm.persistent import Scales
from nanoflow_kernels.gemm.small_m import WeightTiling, gemm_small_m
from support.kernels.checks import Checks
from support.kernels.fp8_checks import Fp8Checks
from torch import Tensor

TILINGS = {
    "whole rows": WeightTiling(64, 256, 3, splits=1, per_sm=1, prefetched_bytes=1024, early=False),
    "halves of rows": WeightTiling(64, 128, 4, splits=2, per_sm=2, prefetched_bytes=256, early=True),
    "more parts than tiles": WeightTiling(64, 256, 3, splits=5, per_sm=3, prefetched_bytes=512, early=True),
    "tall tiles": WeightTiling(128, 128, 4, splits=3, per_sm=2, prefetched_bytes=512, early=False),
}


class SmallMChecks:
    """The checks on one device: with activations of one dtype and, in FP8, of products of e4m3."""

    def __init__(self, device: str, dtype: torch.dtype, fp8: bool) -> None:
        self.fp8, self.checks = fp8, (Fp8Checks if fp8 else Checks)(device, dtype)

    def product(self, tiling: WeightTiling, tokens: int, inner: int, width: int, swiglu: bool, sms: int | None) -> None:
        """It is the reference's; again the same to the bit, whichever program ends last, and for fewer tokens too."""
        x, weight, scales = self.operands(tokens, inner, width)
        columns = width // 2 if swiglu else width
        out, few = self.checks.empty(tokens, columns), self.checks.empty(tokens, columns)
        expected = torch.empty(tokens, columns)
        self.reference(x, weight, scales, swiglu, expected)
        x, weight = self.checks.there(x), self.checks.there(weight)
        scales = scales and Scales(*map(self.checks.there, scales))
        gemm_small_m(x, weight, scales, swiglu=swiglu, out=out, num_sms=sms, tiling=tiling)
        if self.fp8:
            self.checks.close_product("product", out, expected, factors=2 if swiglu else 1)
        else:
            self.checks.close("product", out, expected)
        part = tokens // 2
        for rows in (slice(0, part), slice(part, tokens)):
            of_rows = scales and Scales(scales.x[rows], scales.weight)
            gemm_small_m(x[rows], weight, of_rows, swiglu=swiglu, out=few[rows], num_sms=sms, tiling=tiling)
        assert torch.equal(out, few)

    def operands(self, tokens: int, inner: int, width: int) -> tuple[Tensor, Tensor, Scales | None]:
        if self.fp8:
            x, x_scale, weight, weight_scale = self.checks.operands(tokens, inner, width, blocks=False)
            return x, weight, Scales(x_scale, weight_scale)
        return self.checks.normal(tokens, inner), self.checks.normal(width, inner) / inner**0.5, None

    def reference(self, x: Tensor, weight: Tensor, scales: Scales | None, swiglu: bool, out: Tensor) -> None:
        if scales is not None:
            kernel = reference.scaled_linear_swiglu if swiglu else reference.scaled_linear
            kernel(x, scales.x, weight, scales.weight, out=out)
        else:
            kernel = reference.linear_swiglu if swiglu else reference.linear
            kernel(x.float(), weight.float(), out=out)
