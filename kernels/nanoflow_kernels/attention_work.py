"""AttentionWork: what attention has to do in a nano-batch, listed on the device by one small kernel.

Rows that are alone in their slot decode: their keys are cut into tiles, and the tiles of all (row, kv head) pairs,
one after the other, are dealt out in equal shares, wherever a share's ends fall (as Stream-K does for products:
Osama et al., PPoPP 2023). Rows with neighbours in their slot are a chunk of a prompt, worked on in tiles of queries;
but where there are few rows all decode, which saves a batch of single tokens the launch for chunks.

Shape legend: T tokens, H query heads, K kv heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.grid import programs

DECODE_KEYS = 32  # of a tile of keys that a decoding row reads
DECODE_PER_SM = 6  # programs
# On H200, two programs an SM of 64 rows (363 TFLOP/s) beat one of 128 (334).
QUERIES = 64  # rows of a tile of queries: tokens times the query heads of a kv head
PREFILL_PER_SM = 2
BLOCK = 1024  # rows listed at once
FEW = 16  # rows that all decode


@dataclass(frozen=True)
class AttentionWork:
    """Valid while positions and slots are what they were; the same for every layer of a model.

    stop_tile [T]: tiles of the decode rows up to and with this one. shares [shares, 4]: the row, kv head and tile at
    which a share begins, and how many tiles it has. joins [joins, 4]: a pair that is cut: its row, kv head, the share
    in which it begins, and in how many it lies. query_row [T]: the first row of each tile of queries. counts [3]: tiles
    of keys, tiles of queries, joins.
    """

    stop_tile: Tensor
    shares: Tensor
    joins: Tensor
    query_row: Tensor
    counts: Tensor
    queries: int  # tokens in a tile of queries
    prefill_programs: int  # 0: there are no tiles of queries


@triton.jit
def _list_work(
    positions, slots, stop_tile, share_list, join_list, query_row, counts, T, shares, steps,
    K: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr,
    SHARES: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    key_tiles = 0
    query_tiles = 0
    for begin in range(0, T, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = row < T
        position = tl.load(positions + row, mask=inside, other=-1)
        slot = tl.load(slots + row, mask=inside, other=-1)
        has_before = inside & (row > 0)
        has_after = row < T - 1
        before = tl.load(slots + row - 1, mask=has_before, other=-1)
        after = tl.load(slots + row + 1, mask=has_after, other=-1)
        starts = (before != slot) | (tl.load(positions + row - 1, mask=has_before, other=-1) < 0)
        ends = (after != slot) | (tl.load(positions + row + 1, mask=has_after, other=-1) < 0)
        alone = inside & ((position < 0) | (starts & ends) | FEW)

        # Padding has a tile too, of no keys: its rows become zeros.
        tiles = tl.where(alone, tl.maximum(tl.cdiv(position + 1, KEYS), 1), 0)
        tl.store(stop_tile + row, key_tiles + tl.cumsum(tiles), mask=inside)
        key_tiles += tl.sum(tiles)
        # Tiles of queries are aligned to positions, so that a row need not know where its chunk began.
        first = (inside & (alone == 0) & (starts | (position % QUERIES == 0))).to(tl.int32)
        tl.store(query_row + query_tiles + tl.cumsum(first) - 1, row, mask=first != 0)
        query_tiles += tl.sum(first)
    tl.store(counts, key_tiles)
    tl.store(counts + 1, query_tiles)

    tl.debug_barrier()  # what other threads stored is searched now
    share = tl.arange(0, SHARES)
    size = tl.maximum(tl.cdiv(key_tiles * K, shares), 1)
    begin = share * size
    low = tl.zeros([SHARES], tl.int32)
    high = low + T
    for _ in range(steps):
        middle = (low + high) // 2
        past = tl.load(stop_tile + middle, mask=middle < T, other=2147483647 // K) * K > begin
        high = tl.where(past, middle, high)
        low = tl.where(past, low, middle + 1)
    row = tl.minimum(low, T - 1)  # of shares without tiles too
    row_start = tl.load(stop_tile + row - 1, mask=row > 0, other=0)
    tiles = tl.maximum(tl.load(stop_tile + row) - row_start, 1)
    head = (begin - row_start * K) // tiles
    first = (begin - row_start * K) % tiles
    place, listed = share_list + share * 4, share < shares
    tl.store(place, row, mask=listed)
    tl.store(place + 1, head, mask=listed)
    tl.store(place + 2, first, mask=listed)
    tl.store(place + 3, tl.maximum(tl.minimum(size, key_tiles * K - begin), 0), mask=listed)

    # A pair that is cut is listed by the first of the shares that begin in its midst.
    cut = listed & (begin < key_tiles * K) & (first > 0) & (first <= size)
    place = join_list + (tl.cumsum(cut.to(tl.int32)) - 1) * 4
    tl.store(place, row, mask=cut)
    tl.store(place + 1, head, mask=cut)
    tl.store(place + 2, share - 1, mask=cut)
    tl.store(place + 3, 1 + tl.cdiv(tiles - first, size), mask=cut)
    tl.store(counts + 2, tl.sum(cut.to(tl.int32)))


def list_work(
    positions: Tensor, slots: Tensor, pages: Tensor, heads: int, *, num_sms: int | None = None
) -> AttentionWork:
    """List the attention of rows with these positions and slots, for `heads` query heads.

    positions [T], slots [T], both int32; of pages [pages, 2, K, P, d] the shape counts.
    """
    tokens, device, few = len(positions), positions.device, len(positions) <= FEW
    kv_heads = pages.shape[2]
    shares = programs(1 << 30, num_sms, device, per_sm=DECODE_PER_SM)
    work = AttentionWork(
        stop_tile=torch.empty(tokens, dtype=torch.int32, device=device),
        shares=torch.empty((shares, 4), dtype=torch.int32, device=device),
        joins=torch.empty((min(shares - 1, tokens * kv_heads), 4), dtype=torch.int32, device=device),
        query_row=torch.empty(tokens, dtype=torch.int32, device=device),
        counts=torch.empty(3, dtype=torch.int32, device=device),
        queries=max(1, QUERIES // triton.next_power_of_2(heads // kv_heads)),
        prefill_programs=0 if few else programs(tokens * kv_heads, num_sms, device, per_sm=PREFILL_PER_SM),
    )
    _list_work[(1,)](
        positions, slots, work.stop_tile, work.shares, work.joins, work.query_row, work.counts,
        tokens, shares, tokens.bit_length(), kv_heads, DECODE_KEYS, work.queries,
        BLOCK, triton.next_power_of_2(shares), few, num_warps=8,
    )  # fmt: skip
    return work
