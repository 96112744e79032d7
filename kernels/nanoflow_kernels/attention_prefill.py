"""Attention of chunks of prompts: tiles of queries, a group's heads side by side, over the pages before and in them."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.attention_tile import LOWEST, attend, bulk_tiles
from nanoflow_kernels.attention_work import AttentionWork

KEYS = 64  # of a tile of keys: they beat 128 on H200 also where pages have 128
WARPS, STAGES = 4, 2


@triton.jit
def _prefill(
    q, pages, tiles, positions, slots, page_table, query_row, counts, out,
    T, q_stride, out_stride, table_stride, scale,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, QUERIES: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, BULK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    query = tl.arange(0, QUERIES * GP) // GP
    group = tl.arange(0, QUERIES * GP) % GP
    lane = tl.arange(0, D)
    count = tl.load(counts + 1)
    for item in range(tl.program_id(0), count * K, tl.num_programs(0)):
        first = tl.load(query_row + count - 1 - item // K)  # the last tiles of a chunk have most keys: they go first
        head = item % K
        position = tl.load(positions + first)
        slot = tl.load(slots + first)
        # A tile ends with its chunk, or where positions reach the next multiple of QUERIES.
        after = tl.arange(0, QUERIES)
        same = (first + after < T) & (position % QUERIES + after < QUERIES)
        same = same & (tl.load(slots + first + after, mask=same, other=-1) == slot)
        same = same & (tl.load(positions + first + after, mask=same, other=-1) == position + after)
        rows = tl.sum(same.to(tl.int32))
        length = position + rows

        row = (first + query).to(tl.int64)
        place = (head * G + group)[:, None] * D + lane[None, :]
        real = ((query < rows) & (group < G))[:, None]
        queries = tl.load(q + row[:, None] * q_stride + place, mask=real, other=0.0)
        at = position + tl.minimum(query, rows - 1)
        table = page_table + slot.to(tl.int64) * table_stride
        peak = tl.full([QUERIES * GP], LOWEST, tl.float32)
        mass = tl.zeros([QUERIES * GP], tl.float32)
        acc = tl.zeros([QUERIES * GP, D], tl.float32)
        whole = 0
        if BULK:
            whole = (position + 1) // KEYS
            for tile in tl.range(0, whole, num_stages=STAGES):
                peak, mass, acc = attend(
                    peak, mass, acc, queries, at, tiles, table, tile, head, length, scale, K, D, PAGE, KEYS, True
                )
        for tile in tl.range(whole, tl.cdiv(length, KEYS), num_stages=STAGES):
            peak, mass, acc = attend(
                peak, mass, acc, queries, at, pages, table, tile, head, length, scale, K, D, PAGE, KEYS, False
            )
        o = acc / mass[:, None]
        tl.store(out + row[:, None] * out_stride + place, o.to(out.dtype.element_ty), mask=real)


def prefill(
    q: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    work: AttentionWork,
    *,
    out: Tensor,
) -> None:
    """The tiles of queries of `work`. Operands as in `attention`."""
    tiles = bulk_tiles(pages, KEYS)
    _, _, kv_heads, page_tokens, head_dim = pages.shape
    group = q.shape[1] // head_dim // kv_heads
    _prefill[(work.prefill_programs,)](
        q, pages, tiles, positions, slots, page_table, work.query_row, work.counts, out,
        len(q), q.stride(0), out.stride(0), page_table.stride(0), head_dim**-0.5 * math.log2(math.e),
        kv_heads, group, triton.next_power_of_2(group), head_dim, work.queries, page_tokens, KEYS, tiles is not None,
        STAGES=1 if q.dtype == torch.float32 else STAGES, num_warps=WARPS,
    )  # fmt: skip
