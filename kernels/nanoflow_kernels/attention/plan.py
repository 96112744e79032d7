"""AttentionPlan lists what attention has to do in a nano-batch; one small kernel finds it on the device.

Rows that are alone in their slot are decodes (decode.py): their keys are cut into tiles, and the tiles of
all (row, kv head) pairs, one after the other, are dealt out in equal work items. Rows with neighbours in their slot are
a chunk of a prompt, worked on in tiles of queries (prefill.py). Where there are few rows all are decodes,
which saves a batch of single tokens the launch for chunks.

Shape legend: T tokens, H query heads, K kv heads, W work items.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.attention.decode import DECODE_PER_SM, DecodeWork, decode_keys
from nanoflow_kernels.attention.prefill import PREFILL_PER_SM, PrefillWork, query_tile_tokens
from nanoflow_kernels.grid import programs

PLANNED_ROWS = 1024  # that the planning kernel looks at at once
ALL_DECODE_ROWS = 16  # a batch of no more rows has no prompt chunks: all of its rows are decodes


@dataclass(frozen=True)
class AttentionPlan:
    """The work of one nano-batch, for attention of every layer. Valid while its positions and slots do not change."""

    decode: DecodeWork
    prefill: PrefillWork | None  # None: there are no tiles of queries


@triton.jit
def _plan_attention(
    positions_ptr, slots_ptr, tile_prefix_sum_ptr, work_items_ptr, merges_ptr, query_tile_starts_ptr, counts_ptr,
    T, num_items, search_steps,
    K: tl.constexpr, KEYS: tl.constexpr, QUERY_TOKENS: tl.constexpr, BLOCK: tl.constexpr,
    ITEMS: tl.constexpr, ALL_DECODE: tl.constexpr,
):  # fmt: skip
    """Three lists, in one program: with t_r = max(ceil((position_r + 1) / KEYS), 1) key tiles of each decode row r,

        tile_prefix_sum_r = t_0 + .. + t_r                     (t_r = 0 in rows of a chunk)
        item w = tiles w size .. (w + 1) size - 1 of all pairs,  size = ceil(K tile_prefix_sum_(T-1) / num_items)

    and the merges of pairs that lie in several items. A binary search in the prefix sum finds the row where an item
    begins. Tiles of queries begin where a chunk does, and at positions that are multiples of QUERY_TOKENS.

    References: Osama et al., "Stream-K", PPoPP 2023 (equal work items, wherever their ends fall); Merrill and Garland,
    "Merge-Based Parallel Sparse Matrix-Vector Multiplication", SC 2016 (search in a prefix sum).
    """
    key_tiles = 0
    query_tiles = 0
    for begin in range(0, T, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < T
        position = tl.load(positions_ptr + row, mask=inside, other=-1)
        slot = tl.load(slots_ptr + row, mask=inside, other=-1)
        has_before = inside & (row > 0)
        has_after = row < T - 1
        slot_before = tl.load(slots_ptr + row - 1, mask=has_before, other=-1)
        slot_after = tl.load(slots_ptr + row + 1, mask=has_after, other=-1)
        starts = (slot_before != slot) | (tl.load(positions_ptr + row - 1, mask=has_before, other=-1) < 0)
        ends = (slot_after != slot) | (tl.load(positions_ptr + row + 1, mask=has_after, other=-1) < 0)
        is_decode = inside & ((position < 0) | (starts & ends) | ALL_DECODE)

        # Padding has a tile too, of no keys: its rows become zeros.
        tiles = tl.where(is_decode, tl.maximum(tl.cdiv(position + 1, KEYS), 1), 0)
        tl.store(tile_prefix_sum_ptr + row, key_tiles + tl.cumsum(tiles), mask=inside)
        key_tiles += tl.sum(tiles)
        # Tiles of queries are aligned to positions, so that a row need not know where its chunk began.
        starts_tile = (inside & (is_decode == 0) & (starts | (position % QUERY_TOKENS == 0))).to(tl.int32)
        tl.store(query_tile_starts_ptr + query_tiles + tl.cumsum(starts_tile) - 1, row, mask=starts_tile != 0)
        query_tiles += tl.sum(starts_tile)
    tl.store(counts_ptr, key_tiles)
    tl.store(counts_ptr + 1, query_tiles)

    tl.debug_barrier()  # what other threads stored is searched now
    item = tl.arange(0, ITEMS)
    size = tl.maximum(tl.cdiv(key_tiles * K, num_items), 1)
    begin = item * size
    low = tl.zeros([ITEMS], tl.int32)
    high = low + T
    for _ in range(search_steps):
        middle = (low + high) // 2
        is_past = tl.load(tile_prefix_sum_ptr + middle, mask=middle < T, other=2147483647 // K) * K > begin
        high = tl.where(is_past, middle, high)
        low = tl.where(is_past, low, middle + 1)
    row = tl.minimum(low, T - 1)  # of items without tiles too
    row_begin = tl.load(tile_prefix_sum_ptr + row - 1, mask=row > 0, other=0)
    tiles = tl.maximum(tl.load(tile_prefix_sum_ptr + row) - row_begin, 1)
    head = (begin - row_begin * K) // tiles
    first_tile = (begin - row_begin * K) % tiles
    to_ptr, is_item = work_items_ptr + item * 4, item < num_items
    tl.store(to_ptr, row, mask=is_item)
    tl.store(to_ptr + 1, head, mask=is_item)
    tl.store(to_ptr + 2, first_tile, mask=is_item)
    tl.store(to_ptr + 3, tl.maximum(tl.minimum(size, key_tiles * K - begin), 0), mask=is_item)

    # A pair that is cut is listed once, by the first of the items that begin within it.
    is_cut = is_item & (begin < key_tiles * K) & (first_tile > 0) & (first_tile <= size)
    to_ptr = merges_ptr + (tl.cumsum(is_cut.to(tl.int32)) - 1) * 4
    tl.store(to_ptr, row, mask=is_cut)
    tl.store(to_ptr + 1, head, mask=is_cut)
    tl.store(to_ptr + 2, item - 1, mask=is_cut)
    tl.store(to_ptr + 3, 1 + tl.cdiv(tiles - first_tile, size), mask=is_cut)
    tl.store(counts_ptr + 2, tl.sum(is_cut.to(tl.int32)))


def plan_attention(
    positions: Tensor, slots: Tensor, pages: Tensor, heads: int, *, num_sms: int | None = None
) -> AttentionPlan:
    """Plan the attention of rows with these positions and slots, for `heads` query heads, on `num_sms` SMs.

    positions [T], slots [T], both int32; of pages [pages, 2, K, P, d] the shape and the dtype count.

    Raises:
        ValueError: num_sms is not positive.
    """
    tokens, device, all_decode = len(positions), positions.device, len(positions) <= ALL_DECODE_ROWS
    kv_heads = pages.shape[2]
    items = programs(1 << 30, num_sms, device, per_sm=DECODE_PER_SM)
    counts = torch.empty(3, dtype=torch.int32, device=device)
    decode = DecodeWork(
        tile_prefix_sum=torch.empty(tokens, dtype=torch.int32, device=device),
        work_items=torch.empty((items, 4), dtype=torch.int32, device=device),
        merges=torch.empty((min(items - 1, tokens * kv_heads), 4), dtype=torch.int32, device=device),
        counts=counts,
    )
    prefill = PrefillWork(
        query_tile_starts=torch.empty(tokens, dtype=torch.int32, device=device),
        counts=counts,
        query_tile_tokens=query_tile_tokens(heads, kv_heads),
        programs=programs(tokens * kv_heads, num_sms, device, per_sm=PREFILL_PER_SM),
    )
    _plan_attention[(1,)](
        positions, slots, decode.tile_prefix_sum, decode.work_items, decode.merges, prefill.query_tile_starts, counts,
        tokens, items, tokens.bit_length(), kv_heads, decode_keys(pages), prefill.query_tile_tokens,
        PLANNED_ROWS, triton.next_power_of_2(items), all_decode, num_warps=8,
    )  # fmt: skip
    return AttentionPlan(decode, None if all_decode else prefill)
