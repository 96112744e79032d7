"""The sum of the residual stream and its update, and the RMS norm of it, in one pass over memory.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.grid import programs
from nanoflow_kernels.pdl import launch_dependents, uses_pdl, wait_for_earlier


@triton.jit
def _add_rms_norm(
    residual_ptr, update_ptr, weight_ptr, kept_ptr, normed_ptr, T, D,
    residual_stride, update_stride, kept_stride, normed_stride, eps,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """kept = s = residual + update, normed = s / sqrt(mean(s^2) + eps) * weight, row by row.

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
        tl.store(normed_ptr + row * normed_stride + column, y.to(normed_ptr.dtype.element_ty), mask=inside)


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
    tokens, width = residual.shape
    check_rows("add_rms_norm", residual=residual, update=update, kept=kept, normed=normed)
    check_dtype("add_rms_norm", residual.dtype, update=update, kept=kept, normed=normed)
    check_shape("add_rms_norm", "weight", weight, width)
    for name, tensor in (("update", update), ("kept", kept), ("normed", normed)):
        check_shape("add_rms_norm", name, tensor, tokens, width)
    if tokens == 0:
        return
    block, pdl = triton.next_power_of_2(width), uses_pdl(tokens, residual.device)
    _add_rms_norm[(programs(tokens, num_sms, residual.device, per_sm=16),)](
        residual, update, weight, kept, normed, tokens, width,
        residual.stride(0), update.stride(0), kept.stride(0), normed.stride(0), eps,
        block, pdl, num_warps=min(16, max(1, block // 512)), launch_pdl=pdl,
    )  # fmt: skip
