"""Activations in FP8 (e4m3): rows are measured, scaled and rounded in one pass, also those of SwiGLU.

Shape legend: T tokens, K columns, G scales of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.grid import programs
from nanoflow_kernels.interpreted import INTERPRETED
from nanoflow_kernels.pdl import launch_dependents, uses_pdl, wait_for_earlier
from nanoflow_kernels.swiglu import gated, swiglu

E4M3_MAX = tl.constexpr(448.0)
SMALLEST_AMAX = tl.constexpr(2.0**-100)  # for which scales are made: zeros have a scale that is not zero, too


@triton.jit
def to_e4m3(y):
    """y in e4m3, the nearest, even of two, and the largest for all beyond it; NaN stays NaN.

    The interpreter's cast is right on numbers that e4m3 has, so there y is rounded to one of them before.
    """
    y = tl.clamp(y, -E4M3_MAX, E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    if INTERPRETED:
        magnitude = tl.abs(y)
        bits = magnitude.to(tl.int32, bitcast=True)  # 23 - 3 bits of the mantissa are rounded off
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        subnormal = magnitude + 2.0**14 - 2.0**14  # to multiples of 2^-9
        magnitude = tl.where(magnitude < 2.0**-6, subnormal, normal)
        rounded = tl.where(y < 0, -magnitude, magnitude).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        return tl.where(y == y, rounded, 0x7F).to(tl.float8e4nv, bitcast=True)
    else:
        return y.to(tl.float8e4nv)


@triton.jit
def store_quantised(
    x, row, q_ptr, scale_ptr, static_scale_ptr, upper_bound, columns, q_stride, scale_stride,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store a row x [BLOCK] fp32, zeros from `columns` on, as q = x / scale, with a scale for each GROUP columns of it.

    scale = amax / 448 with the amax of those columns, at most `upper_bound`; or the one at static_scale_ptr, if any.
    """
    grouped = tl.reshape(x, (BLOCK // GROUP, GROUP))
    if static_scale_ptr is None:
        amax = tl.max(tl.abs(grouped), 1)
        scale = tl.div_rn(tl.minimum(tl.maximum(amax, SMALLEST_AMAX), upper_bound), E4M3_MAX)
    else:
        scale = tl.zeros([BLOCK // GROUP], tl.float32) + tl.load(static_scale_ptr)
    inverse = tl.div_rn(1.0, scale)  # rounded as the reference's: products that are ties are ties on both
    q = to_e4m3(tl.reshape(grouped * inverse[:, None], (BLOCK,)))
    column, group = tl.arange(0, BLOCK), tl.arange(0, BLOCK // GROUP)
    tl.store(q_ptr + row * q_stride + column, q, mask=column < columns)
    tl.store(scale_ptr + row * scale_stride + group, scale, mask=group * GROUP < columns)


@triton.jit
def _quantise(
    x_ptr, static_scale_ptr, q_ptr, scale_ptr, T, K, upper_bound, x_stride, q_stride, scale_stride,
    PARTS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q = x / scale of each of the PARTS parts, K columns wide, of T rows; with RUN, of silu(gate) * up of 2 K columns
    that are RUN gates, RUN ups, and so on.
    """
    launch_dependents(PDL)
    column = tl.arange(0, BLOCK)
    inside = column < K
    wait_for_earlier(PDL)
    for item in range(tl.program_id(0), T * PARTS, tl.num_programs(0)):
        row, part = tl.cast(item // PARTS, tl.int64), item % PARTS
        from_ptr = x_ptr + row * x_stride + part * K * (1 if RUN == 0 else 2)
        if RUN == 0:
            x = tl.load(from_ptr + column, mask=inside, other=0).to(tl.float32)
        elif RUN == 1:
            wide = tl.arange(0, 2 * BLOCK)[None, :]
            pairs = tl.load(from_ptr + wide, mask=wide < 2 * K, other=0).to(tl.float32)
            x = tl.reshape(swiglu(pairs, 1, 2 * BLOCK), (BLOCK,)).to(x_ptr.dtype.element_ty).to(tl.float32)
        else:
            gate_ptr = from_ptr + column // RUN * (2 * RUN) + column % RUN
            gate = tl.load(gate_ptr, mask=inside, other=0).to(tl.float32)
            up = tl.load(gate_ptr + RUN, mask=inside, other=0).to(tl.float32)
            x = gated(gate, up).to(x_ptr.dtype.element_ty).to(tl.float32)
        store_quantised(
            x, row, q_ptr + part * K, scale_ptr + part, static_scale_ptr, upper_bound, K, q_stride, scale_stride,
            GROUP, BLOCK,
        )  # fmt: skip


def quantise(
    x: Tensor,
    static_scale: Tensor | None = None,
    *,
    group: int = 0,
    upper_bound: float = 0.0,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Compute (q, scale) with q = x / scale, limited to what e4m3 holds, and scale = amax / 448.

    amax is the largest magnitude of a row (group 0) or of each `group` columns of it, at most `upper_bound` where that
    is positive. With a `static_scale` [1] fp32 that is the scale of all.

    x [T, K] of any floating dtype -> q [T, K] e4m3, scale [T, 1 or K / group] fp32.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    _launch("quantise", x, 0, static_scale, group, upper_bound, out, num_sms)


def swiglu_quantise(
    pairs: Tensor,
    static_scale: Tensor | None = None,
    *,
    run: int = 1,
    group: int = 0,
    upper_bound: float = 0.0,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Compute silu(gate) * up, rounded to pairs' dtype, and quantise it.

    pairs [T, 2 K], whose columns are `run` gates, `run` ups, and so on -> q [T, K] e4m3, scale [T, 1 or K / group].

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    _launch("swiglu_quantise", pairs, run, static_scale, group, upper_bound, out, num_sms)


def check_quantised(kernel: str, tokens: int, width: int, group: int, q: Tensor, scale: Tensor) -> None:
    """Check q [tokens, width] e4m3 and its scales.

    Raises:
        ValueError: names the operand whose shape or dtype is not so.
    """
    check_dtype(kernel, torch.float8_e4m3fn, q=q)
    check_dtype(kernel, torch.float32, scale=scale)
    check_shape(kernel, "q", q, tokens, width)
    check_shape(kernel, "scale", scale, tokens, width // group if group else 1)
    if group and width % group:
        raise ValueError(f"{kernel}: group: expected a divisor of {width} columns, got {group}")


def _launch(
    kernel: str,
    x: Tensor,
    run: int,
    static_scale: Tensor | None,
    group: int,
    upper_bound: float,
    out: tuple[Tensor, Tensor],
    num_sms: int | None,
) -> None:
    q, scale = out
    tokens, width = q.shape
    check_rows(kernel, x=x, q=q, scale=scale)
    check_shape(kernel, "x" if run == 0 else "pairs", x, tokens, width if run == 0 else 2 * width)
    check_quantised(kernel, tokens, width, group, q, scale)
    if tokens == 0:
        return
    # Groups of a power of two are reduced within a row, others are rows of their own.
    parts = width // group if group & (group - 1) else 1
    block, pdl = triton.next_power_of_2(width // parts), uses_pdl(tokens, x.device)
    _quantise[(programs(tokens * parts, num_sms, x.device, per_sm=16),)](
        x, static_scale, q, scale, tokens, width // parts, upper_bound or float("inf"),
        x.stride(0), q.stride(0), scale.stride(0),
        parts, run, group if group and parts == 1 else block, block, pdl,
        num_warps=row_warps(block), launch_pdl=pdl,
    )  # fmt: skip


def row_warps(block: int) -> int:
    """Warps of a program that holds rows of `block` columns in registers."""
    return min(16, max(1, block // 512))
