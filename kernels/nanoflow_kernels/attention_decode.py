"""Attention of single tokens: the query heads of a group are the rows of a tensor cores' tile, keys its columns.

A program is one warp: maxima and sums are found within it, nothing waits for another warp, and six of them an SM, each
with two tiles of keys on their way, keep the memory busy even where few SMs may be used.

Each program takes an equal share of the tiles of all (row, kv head) pairs; a pair cut by a share's end leaves its parts
(peak, mass and weighted sum of values) in a workspace, and a second kernel joins them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.attention_tile import LOWEST, attend, bulk_tiles
from nanoflow_kernels.attention_work import DECODE_KEYS, AttentionWork
from nanoflow_kernels.chain import await_earlier, prefetch, release_next

FEWEST_ROWS = 16  # of the tensor cores' tile
# With DECODE_KEYS and DECODE_PER_SM: of 24 on H200 the fastest on 32 of its SMs (96 GB/s each), as fast as any on all.
# A tile's page is looked up two turns before its copy is waited for, and that is begun two before it is used.
WARPS, STAGES = 1, 5
JOINED_ROWS = 64  # parts times query heads that are joined at once


@triton.jit
def _pair(here, row, stop_tile, K: tl.constexpr):
    """The pair of tile `here`, in `row` or later: its row, its tiles, its kv head, and which of its tiles that is."""
    row_stop = tl.load(stop_tile + row)
    while row_stop * K <= here:  # a row without tiles, or done
        row += 1
        row_stop = tl.load(stop_tile + row)
    row_start = tl.load(stop_tile + row - 1, mask=row > 0, other=0)
    count = row_stop - row_start
    return row, count, (here - row_start * K) // count, (here - row_start * K) % count


@triton.jit
def _decode(
    q, pages, tiles, positions, slots, page_table, stop_tile, first_row, counts, part_peak, part_mass, part_acc, out,
    q_stride, out_stride, table_stride, scale,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    BULK: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    release_next(CHAINED)
    program = tl.program_id(0)
    total = tl.load(counts) * K
    share = tl.cdiv(total, tl.num_programs(0))
    here = program * share
    stop = tl.minimum(here + share, total)
    row = tl.load(first_row + program).to(tl.int64)
    group, lane = tl.arange(0, GP), tl.arange(0, D)
    in_group = (group < G)[:, None]
    if CHAINED and BULK:  # noqa: SIM102 (one condition is the compiler's)
        if here < stop:
            row, _, head, first = _pair(here, row, stop_tile, K)
            table = page_table + tl.load(slots + row).to(tl.int64) * table_stride
            page = tl.load(table + first * KEYS // PAGE, mask=first * KEYS <= tl.load(positions + row), other=0)
            key = (page.to(tl.int64) * 2 * K + head) * PAGE + first * KEYS % PAGE + tl.arange(0, KEYS)
            prefetch(pages + key * D, 2 * D)
            prefetch(pages + (key + K * PAGE) * D, 2 * D)
    await_earlier(CHAINED)
    while here < stop:
        row, count, head, first = _pair(here, row, stop_tile, K)
        last = tl.minimum(count, first + stop - here)
        here += last - first

        length = tl.load(positions + row) + 1
        table = page_table + tl.load(slots + row).to(tl.int64) * table_stride
        place = (head * G + group[:, None]) * D + lane[None, :]
        queries = tl.load(q + row * q_stride + place, mask=in_group, other=0.0)
        at = tl.full([GP], 0, tl.int32) + length - 1
        peak = tl.full([GP], LOWEST, tl.float32)
        mass = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, D], tl.float32)
        whole = first
        if BULK:
            whole = tl.minimum(last, length // KEYS)
            for tile in tl.range(first, whole, num_stages=STAGES):
                peak, mass, acc = attend(
                    peak, mass, acc, queries, at, tiles, table, tile, head, length, scale, K, D, PAGE, KEYS, True
                )
        for tile in tl.range(whole, last, num_stages=1 if BULK else STAGES):
            peak, mass, acc = attend(
                peak, mass, acc, queries, at, pages, table, tile, head, length, scale, K, D, PAGE, KEYS, False
            )

        if last - first == count:
            o = acc / tl.maximum(mass, 1e-30)[:, None]
            tl.store(out + row * out_stride + place, o.to(out.dtype.element_ty), mask=in_group)
        else:
            # A share has at most one pair that began before it, and one that begins in it and goes on behind it.
            part = 2 * program + (first == 0).to(tl.int32)
            tl.store(part_peak + part * GP + group, peak)
            tl.store(part_mass + part * GP + group, mass)
            tl.store(part_acc + part * GP * D + group[:, None] * D + lane[None, :], acc)


@triton.jit
def _join(
    stop_tile, first_row, counts, part_peak, part_mass, part_acc, out, out_stride,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Program i joins the pair that begins in share i and goes on behind it, if there is one."""
    release_next(CHAINED)
    program = tl.program_id(0)
    total = tl.load(counts) * K
    share = tl.cdiv(total, tl.num_programs(0))
    boundary = (program + 1) * share
    row, head, parts = tl.cast(0, tl.int64), 0, 0
    if boundary < total:
        row = tl.load(first_row + program + 1).to(tl.int64)
        row_start = tl.load(stop_tile + row - 1, mask=row > 0, other=0)
        tiles = tl.load(stop_tile + row) - row_start
        head = (boundary - row_start * K) // tiles
        done = (boundary - row_start * K) % tiles
        if (done > 0) & (done <= share):
            parts = 1 + tl.cdiv(tiles - done, share)
    await_earlier(CHAINED)
    if parts > 0:
        group, lane = tl.arange(0, GROUP), tl.arange(0, D)
        peak = tl.full([GROUP], LOWEST, tl.float32)
        mass = tl.zeros([GROUP], tl.float32)
        acc = tl.zeros([GROUP, D], tl.float32)
        for begin in range(0, parts, PARTS):
            number = begin + tl.arange(0, PARTS)
            real = (number < parts)[:, None]
            part = 2 * (program + number) + (number == 0).to(tl.int32)  # only the first share's is the later of its two
            place = part[:, None] * GP + group[None, :]
            peaks = tl.load(part_peak + place, mask=real, other=LOWEST)
            masses = tl.load(part_mass + place, mask=real, other=0.0)
            accs = tl.load(part_acc + place[:, :, None] * D + lane[None, None, :], mask=real[:, :, None], other=0.0)
            highest = tl.maximum(peak, tl.max(peaks, 0))
            fade, fades = tl.exp2(peak - highest), tl.exp2(peaks - highest[None, :])
            mass = mass * fade + tl.sum(masses * fades, 0)
            acc = acc * fade[:, None] + tl.sum(accs * fades[:, :, None], 0)
            peak = highest
        o = acc / tl.maximum(mass, 1e-30)[:, None]
        place = (head * G + group[:, None]) * D + lane[None, :]
        tl.store(out + row * out_stride + place, o.to(out.dtype.element_ty), mask=(group < G)[:, None])


def decode(
    q: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    work: AttentionWork,
    *,
    chained: bool,
    out: Tensor,
) -> None:
    """The rows of `work` that decode, and zeros where padded. Operands as in `attention`, `chained` as in chain.py."""
    tiles = bulk_tiles(pages, DECODE_KEYS)
    _, _, kv_heads, page_tokens, head_dim = pages.shape
    group = q.shape[1] // head_dim // kv_heads
    rows = max(FEWEST_ROWS, triton.next_power_of_2(group))
    shares = len(work.first_row)
    joined_group = triton.next_power_of_2(group)
    part_peak, part_mass = q.new_empty((2, 2 * shares, rows), dtype=torch.float32).unbind()
    part_acc = q.new_empty((2 * shares, rows, head_dim), dtype=torch.float32)
    _decode[(shares,)](
        q, pages, tiles, positions, slots, page_table, work.stop_tile, work.first_row, work.counts,
        part_peak, part_mass, part_acc, out, q.stride(0), out.stride(0), page_table.stride(0),
        head_dim**-0.5 * math.log2(math.e),
        kv_heads, group, rows, head_dim, page_tokens, DECODE_KEYS, tiles is not None,
        1 if q.dtype == torch.float32 else STAGES, chained, num_warps=WARPS, launch_pdl=chained,
    )  # fmt: skip
    _join[(shares,)](
        work.stop_tile, work.first_row, work.counts, part_peak, part_mass, part_acc, out, out.stride(0),
        kv_heads, group, rows, head_dim, joined_group, max(1, JOINED_ROWS // joined_group), chained,
        launch_pdl=chained,
    )  # fmt: skip
