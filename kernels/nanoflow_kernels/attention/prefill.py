"""This kernel computes attention of prompt chunks: tiles of queries read the keys before them, and their own, in pages.

A tile of queries holds some consecutive tokens, and of each the query heads of one kv head side by side.

Shape legend: T tokens, H query heads, K kv heads, G = H / K query heads of a group (GP: padded to a power of two),
d (D) head_dim, P (PAGE) tokens a page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.attention.tile import LOWEST, attend, kv_rows_descriptor, power_of_two, skipped_tiles
from nanoflow_kernels.pdl import launch_dependents, wait_for_earlier
from nanoflow_kernels.quantise import to_e4m3

# On H200, two programs an SM of 64 rows (363 TFLOP/s) beat one of 128 (334).
QUERY_TILE_ROWS = 64  # tokens times the query heads of a kv head
PREFILL_PER_SM = 2  # programs
PREFILL_KEYS = 64  # of a tile of keys: they beat 128 on H200 also where pages have 128
PREFILL_WARPS, PREFILL_STAGES = 4, 2


@dataclass(frozen=True)
class PrefillWork:
    """The tiles of queries of a batch's prompt chunks. Tensors are int32, on the device.

    query_tile_starts [T]: the first row of each tile of queries; only the first counts[1] are set.
    counts [3]: key tiles, query tiles, merges.
    """

    query_tile_starts: Tensor
    counts: Tensor
    query_tile_tokens: int
    programs: int


def query_tile_tokens(heads: int, kv_heads: int) -> int:
    """Tokens in a tile of queries."""
    group = int(triton.next_power_of_2(heads // kv_heads))
    return max(1, QUERY_TILE_ROWS // group)


@triton.jit
def _parts(queries, PARTS: tl.constexpr):
    """(parts, power): a tuple of the PARTS parts of queries [M, D], whose sum they are when multiplied by the power.

    One part is as it is stored, its power 1. Two are of e4m3, and their sum is off by 2^-8 of it or so: the tensor
    cores take e4m3 keys only beside e4m3 queries, and two such products are faster than keys made fp16.
    """
    if PARTS == 1:
        return (queries,), 1.0
    else:
        wide = queries.to(tl.float32)
        power = power_of_two(tl.max(tl.max(tl.abs(wide), 1), 0)) / 128
        wide = wide * (1 / power)
        high = to_e4m3(wide)
        return (high, to_e4m3(wide - high.to(tl.float32))), power


@triton.jit
def _prefill(
    q_ptr, pages_ptr, kv_desc, kv_scales_ptr, positions_ptr, slots_ptr, page_table_ptr, query_tile_starts_ptr,
    counts_ptr, out_ptr, T, q_stride, out_stride, page_table_stride, scale_log2,
    PARTS: tl.constexpr, K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
    PAGE: tl.constexpr, KEYS: tl.constexpr, BULK: tl.constexpr, WINDOW: tl.constexpr, PDL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """o = softmax(q k^T / sqrt(d) + causal mask) v, a tile of queries at a time, by the online softmax of `attend`.

    Tiles of keys before every query of the tile come by bulk copies, without a mask; the last ones are masked. With a
    WINDOW, those that no query sees are left out, and all others are masked.
    With kv_scales_ptr, k and v are e4m3 times kv_scales[0] and [1], and queries are multiplied in PARTS = 2 parts.
    Reference: Dao, "FlashAttention-2", 2023.
    """
    token = tl.arange(0, TOKENS * GP) // GP
    group = tl.arange(0, TOKENS * GP) % GP
    dim = tl.arange(0, D)
    launch_dependents(PDL)
    num_query_tiles = tl.load(counts_ptr + 1)
    wait_for_earlier(PDL)
    for item in range(tl.program_id(0), num_query_tiles * K, tl.num_programs(0)):
        # The last tiles of a chunk have most keys: they go first.
        first_row = tl.load(query_tile_starts_ptr + num_query_tiles - 1 - item // K)
        head = item % K
        first_position = tl.load(positions_ptr + first_row)
        slot = tl.load(slots_ptr + first_row)
        # A tile ends with its chunk, or where positions reach the next multiple of TOKENS.
        after = tl.arange(0, TOKENS)
        in_tile = (first_row + after < T) & (first_position % TOKENS + after < TOKENS)
        in_tile = in_tile & (tl.load(slots_ptr + first_row + after, mask=in_tile, other=-1) == slot)
        in_tile = in_tile & (
            tl.load(positions_ptr + first_row + after, mask=in_tile, other=-1) == first_position + after
        )
        num_rows = tl.sum(in_tile.to(tl.int32))
        length = first_position + num_rows

        row = (first_row + token).to(tl.int64)
        offset = (head * G + group)[:, None] * D + dim[None, :]
        is_real = ((token < num_rows) & (group < G))[:, None]
        loaded = tl.load(q_ptr + row[:, None] * q_stride + offset, mask=is_real, other=0.0)
        queries, power = _parts(loaded, PARTS)
        scale = scale_log2 * power
        if kv_scales_ptr is not None:
            scale = scale * tl.load(kv_scales_ptr)
        position = first_position + tl.minimum(token, num_rows - 1)
        table_ptr = page_table_ptr + slot.to(tl.int64) * page_table_stride
        m_i = tl.full([TOKENS * GP], LOWEST, tl.float32)
        l_i = tl.zeros([TOKENS * GP], tl.float32)
        acc = tl.zeros([TOKENS * GP, D], tl.float32)
        unmasked_tiles = skipped_tiles(first_position + 1, WINDOW, KEYS)
        if BULK and WINDOW == 0:
            unmasked_tiles = (first_position + 1) // KEYS
            for tile in tl.range(0, unmasked_tiles, num_stages=STAGES):
                m_i, l_i, acc = attend(
                    m_i, l_i, acc, queries, position, kv_desc, table_ptr, tile, head, length, scale,
                    PARTS, K, D, PAGE, KEYS, True, WINDOW,
                )  # fmt: skip
        for tile in tl.range(unmasked_tiles, tl.cdiv(length, KEYS), num_stages=STAGES):
            m_i, l_i, acc = attend(
                m_i, l_i, acc, queries, position, pages_ptr, table_ptr, tile, head, length, scale,
                PARTS, K, D, PAGE, KEYS, False, WINDOW,
            )  # fmt: skip
        o = acc / l_i[:, None]
        if kv_scales_ptr is not None:
            o = o * tl.load(kv_scales_ptr + 1)
        tl.store(out_ptr + row[:, None] * out_stride + offset, o.to(out_ptr.dtype.element_ty), mask=is_real)


def prefill(
    q: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    kv_scales: Tensor | None,
    work: PrefillWork,
    *,
    window: int,
    pdl: bool,
    out: Tensor,
) -> None:
    """Compute the rows of a batch that belong to prompt chunks; `attention` has checked the operands.

    q [T, H d], pages [pages, 2, K, P, d], positions [T], slots [T], page_table [S, N], kv_scales [2] fp32 with pages
    of e4m3 -> out [T, H d]; int32, and else one floating dtype. `pdl`: launch with PDL, as in `decode`.
    """
    kv_desc = kv_rows_descriptor(pages, PREFILL_KEYS)
    _, _, kv_heads, page_tokens, head_dim = pages.shape
    group = q.shape[1] // head_dim // kv_heads
    _prefill[(work.programs,)](
        q, pages, kv_desc, kv_scales, positions, slots, page_table, work.query_tile_starts, work.counts, out,
        len(q), q.stride(0), out.stride(0), page_table.stride(0), head_dim**-0.5 * math.log2(math.e),
        1 if kv_scales is None else 2, kv_heads, group, triton.next_power_of_2(group), head_dim,
        work.query_tile_tokens, page_tokens, PREFILL_KEYS, kv_desc is not None, window, pdl,
        STAGES=1 if q.dtype == torch.float32 else PREFILL_STAGES, num_warps=PREFILL_WARPS, launch_pdl=pdl,
    )  # fmt: skip
