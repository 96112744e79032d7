"""Residual and RMS norm in one pass: (s, s / sqrt(mean(s^2) + eps) * weight), s = residual + update.

Shape legend: T tokens, D hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.chain import await_earlier, is_chained, release_next
from nanoflow_kernels.grid import programs
from nanoflow_kernels.operands import check_dtype, check_rows, check_shape


@triton.jit
def _add_rms_norm(
    residual, update, weight, kept, normed, T, D, residual_stride, update_stride, kept_stride, normed_stride, eps,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    release_next(CHAINED)
    column = tl.arange(0, BLOCK)
    inside = column < D
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    await_earlier(CHAINED)
    for item in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(item, tl.int64)
        a = tl.load(residual + row * residual_stride + column, mask=inside, other=0).to(tl.float32)
        b = tl.load(update + row * update_stride + column, mask=inside, other=0).to(tl.float32)
        rounded = (a + b).to(kept.dtype.element_ty)  # the norm is of what is kept
        tl.store(kept + row * kept_stride + column, rounded, mask=inside)
        s = rounded.to(tl.float32)
        y = s * (1 / tl.sqrt(tl.sum(s * s) / D + eps)) * scale
        tl.store(normed + row * normed_stride + column, y.to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    *,
    eps: float,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """(s, s / sqrt(mean(s^2) + eps) * weight) with s = residual + update, rounded as it is kept.

    residual [T, D], update [T, D], weight [D] -> [T, D], [T, D], all of one dtype.
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
    block, chained = triton.next_power_of_2(width), is_chained(tokens, residual.device)
    _add_rms_norm[(programs(tokens, num_sms, residual.device, per_sm=16),)](
        residual, update, weight, kept, normed, tokens, width,
        residual.stride(0), update.stride(0), kept.stride(0), normed.stride(0), eps,
        block, chained, num_warps=min(16, max(1, block // 512)), launch_pdl=chained,
    )  # fmt: skip
