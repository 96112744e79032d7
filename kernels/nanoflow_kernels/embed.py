"""Token embedding, which starts the residual stream of a step.

Shape legend: T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.grid import programs

EMBED_COLUMNS = 2048  # that a program copies at once


@triton.jit
def _embed(
    token_ids_ptr, table_ptr, residual_ptr, update_ptr, T, D,
    token_id_stride, table_stride, residual_stride, update_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """residual[t] = 0, update[t] = table[token_ids[t]]."""
    blocks = tl.cdiv(D, BLOCK)
    for item in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        row = tl.cast(item // blocks, tl.int64)
        column = item % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < D
        token = tl.load(token_ids_ptr + row * token_id_stride).to(tl.int64)
        x = tl.load(table_ptr + token * table_stride + column, mask=inside)
        tl.store(residual_ptr + row * residual_stride + column, tl.zeros_like(x), mask=inside)
        tl.store(update_ptr + row * update_stride + column, x, mask=inside)


def embed(token_ids: Tensor, table: Tensor, *, out: tuple[Tensor, Tensor], num_sms: int | None = None) -> None:
    """Compute (0, table[token_ids]): the residual stream starts at zero, and the embedding is its first update.

    token_ids [T] int32, each below V, table [V, D] -> residual [T, D], update [T, D], of the table's dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    residual, update = out
    tokens, width = len(token_ids), table.shape[1]
    check_rows("embed", table=table, residual=residual, update=update)
    check_dtype("embed", table.dtype, residual=residual, update=update)
    check_shape("embed", "residual", residual, tokens, width)
    check_shape("embed", "update", update, tokens, width)
    if tokens == 0:
        return
    grid = (programs(tokens * triton.cdiv(width, EMBED_COLUMNS), num_sms, table.device, per_sm=16),)
    _embed[grid](
        token_ids, table, residual, update, tokens, width,
        token_ids.stride(0), table.stride(0), residual.stride(0), update.stride(0), EMBED_COLUMNS,
    )  # fmt: skip
