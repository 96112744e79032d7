"""Rotary positions, and the append of K and V to their pages: (a cos w - b sin w, b cos w + a sin w), w = position f.

Shape legend: T tokens, H query heads, K kv heads, d head_dim, S slots, N pages of a slot, P tokens a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.chain import await_earlier, is_chained, release_next
from nanoflow_kernels.grid import programs
from nanoflow_kernels.operands import check_dtype, check_rows, check_shape


@triton.jit
def _rope_append(
    qkv, positions, slots, page_table, frequencies, q, pages, T, qkv_stride, q_stride, table_stride, page_tokens,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    release_next(CHAINED)
    lane = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)
    is_q = (head < H)[:, None]
    is_kv = ((head >= H) & (head < H + 2 * K))[:, None]
    is_v = (head >= H + K)[:, None]
    column = head[:, None] * (2 * HALF) + lane[None, :]
    frequency = tl.load(frequencies + lane).to(tl.float32)
    for item in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(item, tl.int64)
        position = tl.load(positions + row)
        slot = tl.load(slots + row).to(tl.int64)
        angle = position.to(tl.float32) * frequency
        cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
        real = position >= 0
        page = tl.load(page_table + slot * table_stride + position // page_tokens, mask=real, other=0).to(tl.int64)
        await_earlier(CHAINED)
        a = tl.load(qkv + row * qkv_stride + column, mask=is_q | is_kv, other=0)
        b = tl.load(qkv + row * qkv_stride + column + HALF, mask=is_q | is_kv, other=0)
        a32, b32 = a.to(tl.float32), b.to(tl.float32)
        turned_a = tl.where(is_v, a32, a32 * cos - b32 * sin).to(q.dtype.element_ty)
        turned_b = tl.where(is_v, b32, b32 * cos + a32 * sin).to(q.dtype.element_ty)
        tl.store(q + row * q_stride + column, turned_a, mask=is_q)
        tl.store(q + row * q_stride + column + HALF, turned_b, mask=is_q)

        # kv heads lie in one page as K's, then V's: 2 K tiles of [P, d].
        place = ((page * 2 * K + head - H) * page_tokens + position % page_tokens) * (2 * HALF)
        kv = place[:, None] + lane[None, :]
        tl.store(pages + kv, turned_a, mask=is_kv & real)
        tl.store(pages + kv + HALF, turned_b, mask=is_kv & real)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    *,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Rotate queries and keys by position, and append K and V to their pages in place. A row at -1 appends nothing.

    A head's halves are (a, b), as in Hugging Face's layout of the weights; the angles are fp32.

    qkv [T, (H + 2K) d], positions [T], slots [T], page_table [S, N], frequencies [d / 2] -> q [T, H d], pages
    [pages, 2, K, P, d]; all int32 and of one floating dtype, frequencies of any.
    """
    q, pages = out
    kv_heads, page_tokens, head_dim = pages.shape[2:]
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    check_rows("rope_append", qkv=qkv, q=q, page_table=page_table)
    check_dtype("rope_append", qkv.dtype, q=q, pages=pages)
    check_dtype("rope_append", torch.int32, positions=positions, slots=slots, page_table=page_table)
    check_shape("rope_append", "qkv", qkv, tokens, (heads + 2 * kv_heads) * head_dim)
    check_shape("rope_append", "frequencies", frequencies, head_dim // 2)
    if not pages.is_contiguous() or head_dim & (head_dim - 1):
        raise ValueError(
            f"rope_append: pages: expected contiguous, with head_dim a power of two, got {tuple(pages.shape)}"
        )
    if tokens == 0:
        return
    chained = is_chained(tokens, q.device)
    _rope_append[(programs(tokens, num_sms, q.device, per_sm=16),)](
        qkv, positions, slots, page_table, frequencies, q, pages, tokens,
        qkv.stride(0), q.stride(0), page_table.stride(0), page_tokens,
        heads, kv_heads, head_dim // 2, triton.next_power_of_2(heads + 2 * kv_heads), chained,
        num_warps=8, launch_pdl=chained,
    )  # fmt: skip
