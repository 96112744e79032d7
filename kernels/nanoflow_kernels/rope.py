"""Rotary positions (RoPE) of queries and keys, and the append of keys and values to their pages, in one pass.

Shape legend: T tokens, H query heads, K kv heads, d head_dim, S slots, N pages of a slot, P tokens a page.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_pages, check_rows, check_shape
from nanoflow_kernels.grid import programs
from nanoflow_kernels.pdl import launch_dependents, uses_pdl, wait_for_earlier
from nanoflow_kernels.quantise import to_e4m3


@triton.jit
def _rope_append(
    qkv_ptr, positions_ptr, slots_ptr, page_table_ptr, frequencies_ptr, kv_scales_ptr, q_ptr, pages_ptr, T,
    qkv_stride, q_stride, page_table_stride, page_tokens,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """(a cos w - b sin w, b cos w + a sin w) with w = position * frequency, of each head's halves (a, b) of q and k.

    V is not rotated. Rotated K, and V, go to place position % P of the page that the page table has for position / P.
    With kv_scales_ptr they are divided by its scales, of K and of V, and rounded to e4m3.
    Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    launch_dependents(PDL)
    dim = tl.arange(0, HALF)
    head = tl.arange(0, HEADS)
    is_q = (head < H)[:, None]
    is_kv = ((head >= H) & (head < H + 2 * K))[:, None]
    is_v = (head >= H + K)[:, None]
    column = head[:, None] * (2 * HALF) + dim[None, :]
    frequency = tl.load(frequencies_ptr + dim).to(tl.float32)
    for item in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(item, tl.int64)
        position = tl.load(positions_ptr + row)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        angle = position.to(tl.float32) * frequency
        cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
        is_real = position >= 0
        page = tl.load(
            page_table_ptr + slot * page_table_stride + position // page_tokens, mask=is_real, other=0
        ).to(tl.int64)  # fmt: skip
        wait_for_earlier(PDL)
        a = tl.load(qkv_ptr + row * qkv_stride + column, mask=is_q | is_kv, other=0)
        b = tl.load(qkv_ptr + row * qkv_stride + column + HALF, mask=is_q | is_kv, other=0)
        a32, b32 = a.to(tl.float32), b.to(tl.float32)
        rotated_a = tl.where(is_v, a32, a32 * cos - b32 * sin)
        rotated_b = tl.where(is_v, b32, b32 * cos + a32 * sin)
        tl.store(q_ptr + row * q_stride + column, rotated_a.to(q_ptr.dtype.element_ty), mask=is_q)
        tl.store(q_ptr + row * q_stride + column + HALF, rotated_b.to(q_ptr.dtype.element_ty), mask=is_q)

        # kv heads lie in one page as K's, then V's: 2 K tiles of [P, d].
        page_offset = ((page * 2 * K + head - H) * page_tokens + position % page_tokens) * (2 * HALF)
        offset = page_offset[:, None] + dim[None, :]
        if kv_scales_ptr is None:
            kept_a, kept_b = rotated_a.to(pages_ptr.dtype.element_ty), rotated_b.to(pages_ptr.dtype.element_ty)
        else:
            per_scale = 1 / tl.where(is_v, tl.load(kv_scales_ptr + 1), tl.load(kv_scales_ptr))
            kept_a, kept_b = to_e4m3(rotated_a * per_scale), to_e4m3(rotated_b * per_scale)
            # A thread stores as many as it has of 16 bits. Else the compiler rotates all again in a layout for bytes.
            offset = tl.max_contiguous(offset, [1, 8])
        tl.store(pages_ptr + offset, kept_a, mask=is_kv & is_real)
        tl.store(pages_ptr + offset + HALF, kept_b, mask=is_kv & is_real)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    kv_scales: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Rotate queries and keys by position, and append K and V to their pages in place. A row at -1 appends nothing.

    A head's halves are (a, b), as in Hugging Face's layout of the weights; the angles are fp32.

    qkv [T, (H + 2K) d], positions [T], slots [T], page_table [S, N], frequencies [d / 2] -> q [T, H d], pages
    [pages, 2, K, P, d]; ints are int32, the others of one floating dtype, frequencies of any. Or
    pages are of e4m3 and get K / kv_scales[0] and V / kv_scales[1], limited to what e4m3 holds: kv_scales [2] fp32.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    q, pages = out
    kv_heads, page_tokens, head_dim = pages.shape[2:]
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    check_rows("rope_append", qkv=qkv, q=q, page_table=page_table)
    check_dtype("rope_append", qkv.dtype, q=q)
    check_pages("rope_append", pages, qkv.dtype, kv_scales)
    check_dtype("rope_append", torch.int32, positions=positions, slots=slots, page_table=page_table)
    check_shape("rope_append", "qkv", qkv, tokens, (heads + 2 * kv_heads) * head_dim)
    check_shape("rope_append", "frequencies", frequencies, head_dim // 2)
    if not pages.is_contiguous() or head_dim & (head_dim - 1):
        raise ValueError(
            f"rope_append: pages: expected contiguous, with head_dim a power of two, got {tuple(pages.shape)}"
        )
    if tokens == 0:
        return
    pdl = uses_pdl(tokens, q.device)
    _rope_append[(programs(tokens, num_sms, q.device, per_sm=16),)](
        qkv, positions, slots, page_table, frequencies, kv_scales, q, pages, tokens,
        qkv.stride(0), q.stride(0), page_table.stride(0), page_tokens,
        heads, kv_heads, head_dim // 2, triton.next_power_of_2(heads + 2 * kv_heads), pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
