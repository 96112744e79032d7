"""The sum of the residual stream and its update, and the RMS norm of it, in one pass over memory; also in FP8.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.grid import programs
from nanoflow_kernels.pdl import launch_dependents, uses_pdl, wait_for_earlier
from nanoflow_kernels.quantise import check_quantised, row_warps, store_quantised


@triton.jit
def _add_rms_norm(
    residual_ptr, update_ptr, weight_ptr, kept_ptr, normed_ptr, scale_ptr, static_scale_ptr, T, D,
    residual_stride, update_stride, kept_stride, normed_stride, scale_stride, eps, upper_bound,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """kept = s = residual + update, normed = s / sqrt(mean(s^2) + eps) * weight, row by row.

    With scale_ptr, normed is quantised as it is rounded to kept's dtype (see store_quantised).

    Reference: Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
    """
    launch_dependents(PDL)
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    wait_for_earlier(PDL)
    for item in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(item, tl.int64)
        a = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0).to(tl.float32)
        b = tl.load(update_ptr + row * update_stride + column, mask=inside, other=0).to(tl.float32)
        rounded = (a + b).to(kept_ptr.dtype.element_ty)  # the norm is of what is kept
        tl.store(kept_ptr + row * kept_stride + column, rounded, mask=inside)
        s = rounded.to(tl.float32)
        y = s * (1 / tl.sqrt(tl.sum(s * s) / D + eps)) * w
        if scale_ptr is None:
            tl.store(normed_ptr + row * normed_stride + column, y.to(normed_ptr.dtype.element_ty), mask=inside)
        else:
            y = y.to(kept_ptr.dtype.element_ty).to(tl.float32)
            store_quantised(
                y, row, normed_ptr, scale_ptr, static_scale_ptr, upper_bound, D, normed_stride, scale_stride,
                GROUP, BLOCK,
            )  # fmt: skip


def add_rms_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    *,
    eps: float,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Compute (s, s / sqrt(mean(s^2) + eps) * weight) with s = residual + update, rounded as it is kept.

    residual [T, D], update [T, D], weight [D] -> kept [T, D], normed [T, D], all of one floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    kept, normed = out
    check_rows("add_rms_norm", residual=residual, update=update, kept=kept, normed=normed)
    check_dtype("add_rms_norm", residual.dtype, normed=normed)
    check_shape("add_rms_norm", "normed", normed, *residual.shape)
    _launch("add_rms_norm", residual, update, weight, kept, normed, None, None, eps, 0, 0.0, num_sms)


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
    num_sms: int | None = None,
) -> None:
    """Compute add_rms_norm, and quantise its normed row as it is rounded to the activations' dtype (see quantise).

    residual [T, D], update [T, D], weight [D] -> kept [T, D], all of one floating dtype, q [T, D] e4m3, scale
    [T, 1 or D / group] fp32. `group` is 0 or a power of two.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    kept, q, scale = out
    check_rows("add_rms_norm_quantise", residual=residual, update=update, kept=kept, q=q, scale=scale)
    check_quantised("add_rms_norm_quantise", len(residual), residual.shape[1], group, q, scale)
    if group & (group - 1):
        raise ValueError(f"add_rms_norm_quantise: group: expected 0 or a power of two, got {group}")
    kernel = "add_rms_norm_quantise"
    _launch(kernel, residual, update, weight, kept, q, scale, static_scale, eps, group, upper_bound, num_sms)


def _launch(
    kernel: str,
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    kept: Tensor,
    normed: Tensor,
    scale: Tensor | None,
    static_scale: Tensor | None,
    eps: float,
    group: int,
    upper_bound: float,
    num_sms: int | None,
) -> None:
    tokens, width = residual.shape
    check_dtype(kernel, residual.dtype, update=update, kept=kept)
    check_shape(kernel, "weight", weight, width)
    check_shape(kernel, "update", update, tokens, width)
    check_shape(kernel, "kept", kept, tokens, width)
    if tokens == 0:
        return
    block, pdl = triton.next_power_of_2(width), uses_pdl(tokens, residual.device)
    _add_rms_norm[(programs(tokens, num_sms, residual.device, per_sm=16),)](
        residual, update, weight, kept, normed, scale, static_scale, tokens, width,
        residual.stride(0), update.stride(0), kept.stride(0), normed.stride(0),
        0 if scale is None else scale.stride(0), eps, upper_bound or float("inf"),
        group or block, block, pdl, num_warps=row_warps(block), launch_pdl=pdl,
    )  # fmt: skip
