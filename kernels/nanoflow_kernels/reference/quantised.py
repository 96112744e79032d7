"""Activations in FP8 (e4m3): a scale a token or a group of its columns, measured here or calibrated before."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_kernels.reference.products import gated
from nanoflow_kernels.reference.rows import E4M3_MAX, add_rms_norm

SMALLEST_AMAX = 2.0**-100  # for which scales are made: that of zeros is not zero, and no scale is subnormal


def quantise(
    x: Tensor,
    static_scale: Tensor | None = None,
    *,
    group: int = 0,
    upper_bound: float = 0.0,
    out: tuple[Tensor, Tensor],
) -> None:
    """Compute (q, scale) with q = x / scale, limited to what e4m3 holds, and scale = amax / 448.

    amax is the largest magnitude of a row (group 0) or of each `group` columns of it, at most `upper_bound` where that
    is positive. With a `static_scale` [1] that is the scale of all.

    x [T, K] -> q [T, K] e4m3, scale [T, 1 or K / group] fp32.
    """
    q, scale = out
    grouped = x.float().unflatten(1, (scale.shape[1], -1 if x.shape[1] else 0))
    if static_scale is None:
        amax = grouped.abs().amax(-1)
        scale.copy_(amax.clamp(SMALLEST_AMAX, upper_bound or None) / E4M3_MAX)
    else:
        scale.copy_(static_scale.expand_as(scale))
    q.copy_((grouped * (1 / scale)[..., None]).clamp(-E4M3_MAX, E4M3_MAX).flatten(1))


def add_rms_norm_quantise(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    static_scale: Tensor | None = None,
    *,
    eps: float,
    group: int = 0,
    upper_bound: float = 0.0,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Compute add_rms_norm, and quantise its normed row as it is rounded to the activations' dtype.

    residual [T, D], update [T, D], weight [D] -> kept [T, D], q [T, D] e4m3, scale [T, 1 or D / group] fp32.
    """
    kept, q, scale = out
    normed = torch.empty_like(kept)
    add_rms_norm(residual, update, weight, eps=eps, out=(kept, normed))
    quantise(normed, static_scale, group=group, upper_bound=upper_bound, out=(q, scale))


def swiglu_quantise(
    pairs: Tensor,
    static_scale: Tensor | None = None,
    *,
    run: int = 1,
    group: int = 0,
    upper_bound: float = 0.0,
    out: tuple[Tensor, Tensor],
) -> None:
    """Compute silu(gate) * up, rounded to pairs' dtype, and quantise it.

    pairs [T, 2 F], whose columns are `run` gates, `run` ups, and so on -> q [T, F] e4m3, scale [T, 1 or F / group].
    """
    y = gated(pairs, run).to(pairs.dtype)
    quantise(y, static_scale, group=group, upper_bound=upper_bound, out=out)


def dequantise(q: Tensor, scale: Tensor) -> Tensor:
    """q [T, K] times the scales [T, G] of each K / G columns, in fp32."""
    values: Tensor = q.float().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    return values.flatten(1)
