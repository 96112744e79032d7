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

    stop_tile [T]: tiles of the decode rows up to and with this one. first_row [shares]: the decode row in which a
    share begins. query_row [T]: the first row of each tile of queries. counts [2]: tiles of keys, tiles of queries.
    """

    stop_tile: Tensor
    first_row: Tensor
    query_row: Tensor
    counts: Tensor
    queries: int  # tokens in a tile of queries
    prefill_programs: int  # 0: there are no tiles of queries


@triton.jit
def _list_work(
    positions, slots, stop_tile, first_row, query_row, counts, T, shares, steps,
    K: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr, BLOCK: tl.constexpr, SHARES: tl.constexpr,
    FEW: tl.constexpr,
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
    begin = share * tl.cdiv(key_tiles * K, shares)
    low = tl.zeros([SHARES], tl.int32)
    high = low + T
    for _ in range(steps):
        middle = (low + high) // 2
        past = tl.load(stop_tile + middle, mask=middle < T, other=2147483647 // K) * K > begin
        high = tl.where(past, middle, high)
        low = tl.where(past, low, middle + 1)
    tl.store(first_row + share, low, mask=share < shares)


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
        first_row=torch.empty(shares, dtype=torch.int32, device=device),
        query_row=torch.empty(tokens, dtype=torch.int32, device=device),
        counts=torch.empty(2, dtype=torch.int32, device=device),
        queries=max(1, QUERIES // triton.next_power_of_2(heads // kv_heads)),
        prefill_programs=0 if few else programs(tokens * kv_heads, num_sms, device, per_sm=PREFILL_PER_SM),
    )
    _list_work[(1,)](
        positions, slots, work.stop_tile, work.first_row, work.query_row, work.counts,
        tokens, shares, tokens.bit_length(), kv_heads, DECODE_KEYS, work.queries,
        BLOCK, triton.next_power_of_2(shares), few, num_warps=8,
    )  # fmt: skip
    return work
