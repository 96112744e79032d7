"""Rotary positions (RoPE) of queries and keys, and the append of keys and values to their pages, in one pass.

Shape legend: T tokens, H query heads, K kv heads, d head_dim, r its dimensions that are rotated, S slots, N pages of a
slot, P tokens a page.
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
def _norm_weight(q_ptr, k_ptr, is_q, is_v):
    """[HEADS, HALF]: the weight of each head's norm, 1 for heads of V."""
    of_q, of_k = tl.load(q_ptr).to(tl.float32)[None, :], tl.load(k_ptr).to(tl.float32)[None, :]
    return tl.where(is_v, 1.0, tl.where(is_q, of_q, of_k))


@triton.jit
def _rope_append(
    qkv_ptr, positions_ptr, slots_ptr, page_table_ptr, frequencies_ptr, q_norm_ptr, k_norm_ptr, kv_scales_ptr,
    q_ptr, pages_ptr, T, qkv_stride, q_stride, page_table_stride, page_tokens, eps, attention_factor,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr, HEADS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """(a cos w - b sin w, b cos w + a sin w) with w = position * frequency, of each head's halves (a, b) of q and k.

    Both times attention_factor. Where TURNED < HALF, only a head's first 2 TURNED dimensions are rotated, and have
    halves of their own. With q_norm_ptr and k_norm_ptr, the RMS norm of each head of q and k comes first.
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
    # Of each pair: its first dimension, how far the second is from that, and how it turns.
    if TURNED == HALF:
        first, apart = dim, HALF
        frequency = tl.load(frequencies_ptr + dim).to(tl.float32)
        factor = attention_factor
    else:
        turns = dim < TURNED
        first, apart = tl.where(turns, dim, dim + TURNED), tl.where(turns, TURNED, HALF - TURNED)
        frequency = tl.load(frequencies_ptr + dim, mask=turns, other=0).to(tl.float32)
        factor = tl.where(turns, attention_factor, 1.0)
    column = head[:, None] * (2 * HALF) + first[None, :]
    if q_norm_ptr is not None:
        weight_a = _norm_weight(q_norm_ptr + first, k_norm_ptr + first, is_q, is_v)
        weight_b = _norm_weight(q_norm_ptr + apart + first, k_norm_ptr + apart + first, is_q, is_v)
    for item in range(tl.program_id(0), T, tl.num_programs(0)):
        row = tl.cast(item, tl.int64)
        position = tl.load(positions_ptr + row)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        angle = position.to(tl.float32) * frequency
        cos, sin = (factor * tl.cos(angle))[None, :], (factor * tl.sin(angle))[None, :]
        is_real = position >= 0
        page = tl.load(
            page_table_ptr + slot * page_table_stride + position // page_tokens, mask=is_real, other=0
        ).to(tl.int64)  # fmt: skip
        wait_for_earlier(PDL)
        a = tl.load(qkv_ptr + row * qkv_stride + column, mask=is_q | is_kv, other=0)
        b = tl.load(qkv_ptr + row * qkv_stride + column + apart, mask=is_q | is_kv, other=0)
        a32, b32 = a.to(tl.float32), b.to(tl.float32)
        if q_norm_ptr is not None:
            mean = tl.sum(a32 * a32 + b32 * b32, 1)[:, None] / (2 * HALF)
            scale = tl.where(is_v, 1.0, 1 / tl.sqrt(mean + eps))
            a32, b32 = a32 * scale * weight_a, b32 * scale * weight_b
        rotated_a = tl.where(is_v, a32, a32 * cos - b32 * sin)
        rotated_b = tl.where(is_v, b32, b32 * cos + a32 * sin)
        tl.store(q_ptr + row * q_stride + column, rotated_a.to(q_ptr.dtype.element_ty), mask=is_q)
        tl.store(q_ptr + row * q_stride + column + apart, rotated_b.to(q_ptr.dtype.element_ty), mask=is_q)

        # kv heads lie in one page as K's, then V's: 2 K tiles of [P, d].
        page_offset = ((page * 2 * K + head - H) * page_tokens + position % page_tokens) * (2 * HALF)
        offset = page_offset[:, None] + first[None, :]
        if kv_scales_ptr is None:
            kept_a, kept_b = rotated_a.to(pages_ptr.dtype.element_ty), rotated_b.to(pages_ptr.dtype.element_ty)
        else:
            per_scale = 1 / tl.where(is_v, tl.load(kv_scales_ptr + 1), tl.load(kv_scales_ptr))
            kept_a, kept_b = to_e4m3(rotated_a * per_scale), to_e4m3(rotated_b * per_scale)
            # A thread stores as many as it has of 16 bits. Else the compiler rotates all again in a layout for bytes.
            if TURNED % 8 == 0:
                offset = tl.max_contiguous(offset, [1, 8])
        tl.store(pages_ptr + offset, kept_a, mask=is_kv & is_real)
        tl.store(pages_ptr + offset + apart, kept_b, mask=is_kv & is_real)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    kv_scales: Tensor | None = None,
    *,
    attention_factor: float = 1.0,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Rotate queries and keys by position, and append K and V to their pages in place. A row at -1 appends nothing.

    The halves of a head's first r dimensions are (a, b), as in Hugging Face's layout of the weights; the angles are
    fp32. What is rotated is multiplied by attention_factor, too.

    qkv [T, (H + 2K) d], positions [T], slots [T], page_table [S, N], frequencies [r / 2] -> q [T, H d], pages
    [pages, 2, K, P, d]; ints are int32, the others of one floating dtype, frequencies of any. Or
    pages are of e4m3 and get K / kv_scales[0] and V / kv_scales[1], limited to what e4m3 holds: kv_scales [2] fp32.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    rows = (positions, slots, page_table)
    _launch("rope_append", qkv, rows, frequencies, None, kv_scales, 0.0, attention_factor, out, num_sms)


def norm_rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    kv_scales: Tensor | None = None,
    *,
    eps: float,
    attention_factor: float = 1.0,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Compute rope_append with every head x of Q and of K replaced by x / sqrt(mean(x^2) + eps) * its norm's weight.

    Operands are those of rope_append, and q_norm [d], k_norm [d] of any floating dtype.

    Raises:
        ValueError: as rope_append.
    """
    rows, norms = (positions, slots, page_table), (q_norm, k_norm)
    _launch("norm_rope_append", qkv, rows, frequencies, norms, kv_scales, eps, attention_factor, out, num_sms)


def _launch(
    name: str,
    qkv: Tensor,
    rows: tuple[Tensor, Tensor, Tensor],
    frequencies: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    kv_scales: Tensor | None,
    eps: float,
    attention_factor: float,
    out: tuple[Tensor, Tensor],
    num_sms: int | None,
) -> None:
    """Check the operands of either kernel and launch it. rows: positions, slots, page_table."""
    (positions, slots, page_table), (q, pages) = rows, out
    kv_heads, page_tokens, head_dim = pages.shape[2:]
    tokens, heads = q.shape[0], q.shape[1] // head_dim
    check_rows(name, qkv=qkv, q=q, page_table=page_table)
    check_dtype(name, qkv.dtype, q=q)
    check_pages(name, pages, qkv.dtype, kv_scales)
    check_dtype(name, torch.int32, positions=positions, slots=slots, page_table=page_table)
    check_shape(name, "qkv", qkv, tokens, (heads + 2 * kv_heads) * head_dim)
    if frequencies.ndim != 1 or not 0 < len(frequencies) <= head_dim // 2:
        raise ValueError(
            f"{name}: frequencies: expected one for each pair of at most {head_dim} dimensions, got "
            f"{tuple(frequencies.shape)}"
        )
    for norm, weight in zip(("q_norm", "k_norm"), norms or (), strict=False):
        check_shape(name, norm, weight, head_dim)
    if not pages.is_contiguous() or head_dim & (head_dim - 1):
        raise ValueError(f"{name}: pages: expected contiguous, with head_dim a power of two, got {tuple(pages.shape)}")
    if tokens == 0:
        return
    q_norm, k_norm = norms or (None, None)
    pdl = uses_pdl(tokens, q.device)
    _rope_append[(programs(tokens, num_sms, q.device, per_sm=16),)](
        qkv, positions, slots, page_table, frequencies, q_norm, k_norm, kv_scales,
        q, pages, tokens, qkv.stride(0), q.stride(0), page_table.stride(0), page_tokens, eps, attention_factor,
        heads, kv_heads, head_dim // 2, len(frequencies), triton.next_power_of_2(heads + 2 * kv_heads), pdl,
        num_warps=8, launch_pdl=pdl,
    )  # fmt: skip
