"""Attention of single tokens: keys are the rows of a tensor cores' tile, the query heads of a group its columns.

A tile may have 8 columns, but no less than 16 rows: so a group of few heads leaves less of it empty.

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
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.attention_tile import LOWEST, gathered_tile
from nanoflow_kernels.attention_work import DECODE_KEYS, AttentionWork
from nanoflow_kernels.chain import await_earlier, prefetch, release_next

FEWEST_COLUMNS = 8  # of the tensor cores' tile
# With DECODE_KEYS and DECODE_PER_SM: of those tried on H200 as fast as any, on 32 of its SMs and on all. With tiles
# called into the L2 cache further ahead, or one loop over all pairs of a share, it was slower.
# A tile's page is looked up two turns before its copy is waited for, and that is begun two before it is used.
WARPS, STAGES = 1, 5
REGISTERS = 255  # of a thread, at most: an SM has them for six programs; unasked, the assembler keeps to 128 and spills
JOINED = 64  # parts of a query head that are joined at once


def _slabs(pages: Tensor, keys: int) -> TensorDescriptor | None:
    """What bulk copies read keys from that lie in one page [P, d] of one head; None where pages are not whole tiles."""
    page_tokens, head_dim = pages.shape[3:]
    if page_tokens % keys:
        return None
    return TensorDescriptor.from_tensor(pages.view(-1, page_tokens, head_dim), [1, keys, head_dim])


@triton.jit
def _decode(
    q, pages, slabs, positions, slots, page_table, stop_tile, shares, part_peak, part_mass, part_acc, out,
    q_stride, out_stride, table_stride, scale,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    BULK: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    release_next(CHAINED)
    program = tl.program_id(0)
    share = shares + 4 * program
    row, head, first = tl.load(share).to(tl.int64), tl.load(share + 1), tl.load(share + 2)
    left = tl.load(share + 3)  # tiles of the share
    length = tl.load(positions + row) + 1
    table = page_table + tl.load(slots + row).to(tl.int64) * table_stride
    group, lane = tl.arange(0, GP), tl.arange(0, D)
    in_group = (group < G)[None, :]
    within = group[None, :] * D + lane[:, None]
    if left > 0:  # others need not wait: while one of a kernel's programs does, no kernel behind it comes too early
        if CHAINED and BULK:
            page = tl.load(table + first * KEYS // PAGE, mask=first * KEYS < length, other=0).to(tl.int64)
            place = (page * 2 * K + head) * PAGE + first * KEYS % PAGE + tl.arange(0, KEYS)
            prefetch(pages + place * D, 2 * D)
            prefetch(pages + (place + K * PAGE) * D, 2 * D)
        await_earlier(CHAINED)
    queries = tl.load(q + row * q_stride + head * G * D + within, mask=in_group & (left > 0), other=0.0)
    while left > 0:
        count = tl.maximum(tl.cdiv(length, KEYS), 1)  # padding has one tile, of no keys
        last = tl.minimum(count, first + left)
        peak = tl.full([GP], LOWEST, tl.float32)
        mass = tl.zeros([KEYS, GP], tl.float32)  # summed over keys at the end: until then no thread needs another's
        acc = tl.zeros([D, GP], tl.float32)
        for tile in tl.range(first, last, num_stages=STAGES):
            # The last tile ends with the last key: it repeats keys of the tile before, and has zeros before its page.
            begin = tl.minimum(length, (tile + 1) * KEYS) - KEYS
            key = begin + tl.arange(0, KEYS)
            new = key >= tile * KEYS
            if BULK:
                number = tile * KEYS // PAGE
                slab = tl.load(table + number, mask=tile * KEYS < length, other=0) * 2 * K + head
                k = tl.reshape(slabs.load([slab, begin - number * PAGE, 0]), (KEYS, D))
                v = tl.reshape(slabs.load([slab + K, begin - number * PAGE, 0]), (KEYS, D))
            else:
                k, v = gathered_tile(pages, table, head, key, new, K, D, PAGE)
            s = tl.dot(k, queries, input_precision="ieee")
            s = tl.where(new[:, None], s, -float("inf"))
            highest = tl.maximum(peak, tl.max(s, 0) * scale)
            p = tl.exp2(s * scale - highest[None, :])
            fade = tl.exp2(peak - highest)
            acc = tl.dot(v.T, p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
            mass = mass * fade[None, :] + p
            peak = highest
        mass = tl.sum(mass, 0)

        # A share has at most one pair that began before it, and one that begins in it and goes on behind it.
        is_whole, part = last - first == count, (2 * program + (first == 0).to(tl.int32)) * G
        to = out + row * out_stride + head * G * D
        left -= last - first
        first = 0
        head += 1
        if (head == K) & (left > 0):
            head = 0
            row += 1
            while tl.load(stop_tile + row) == tl.load(stop_tile + row - 1):  # a row of a chunk
                row += 1
            length = tl.load(positions + row) + 1
            table = page_table + tl.load(slots + row).to(tl.int64) * table_stride
        queries = tl.load(q + row * q_stride + head * G * D + within, mask=in_group & (left > 0), other=0.0)
        if is_whole:
            o = acc / tl.maximum(mass, 1e-30)[None, :]
            tl.store(to + within, o.to(out.dtype.element_ty), mask=in_group)
        else:
            tl.store(part_peak + part + group, peak, mask=group < G)
            tl.store(part_mass + part + group, mass, mask=group < G)
            tl.store(part_acc + part * D + within, acc, mask=in_group)


@triton.jit
def _join(
    joins, counts, part_peak, part_mass, part_acc, out, out_stride,
    G: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Program (i, g) joins query head g of pair i of those that are cut, if there are so many."""
    release_next(CHAINED)
    join = joins + 4 * tl.program_id(0)
    real = tl.program_id(0) < tl.load(counts + 2)
    row, head = tl.load(join, mask=real, other=0).to(tl.int64), tl.load(join + 1, mask=real, other=0)
    share, parts = tl.load(join + 2, mask=real, other=0), tl.load(join + 3, mask=real, other=0)
    await_earlier(CHAINED)
    if real:
        group, lane = tl.program_id(1), tl.arange(0, D)
        peak = tl.cast(LOWEST, tl.float32)
        mass = tl.cast(0, tl.float32)
        acc = tl.zeros([D], tl.float32)
        for begin in range(0, parts, PARTS):
            number = begin + tl.arange(0, PARTS)
            inside = number < parts
            part = 2 * (share + number) + (number == 0).to(tl.int32)  # only the first share's is the later of its two
            place = part * G + group
            peaks = tl.load(part_peak + place, mask=inside, other=LOWEST)
            masses = tl.load(part_mass + place, mask=inside, other=0.0)
            accs = tl.load(part_acc + place[:, None] * D + lane[None, :], mask=inside[:, None], other=0.0)
            highest = tl.maximum(peak, tl.max(peaks, 0))
            fade, fades = tl.exp2(peak - highest), tl.exp2(peaks - highest)
            mass = mass * fade + tl.sum(masses * fades, 0)
            acc = acc * fade + tl.sum(accs * fades[:, None], 0)
            peak = highest
        o = acc / tl.maximum(mass, 1e-30)
        tl.store(out + row * out_stride + (head * G + group) * D + lane, o.to(out.dtype.element_ty))


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
    slabs = _slabs(pages, DECODE_KEYS)
    _, _, kv_heads, page_tokens, head_dim = pages.shape
    group = q.shape[1] // head_dim // kv_heads
    columns = max(FEWEST_COLUMNS, triton.next_power_of_2(group))
    shares = len(work.shares)
    part_peak, part_mass = q.new_empty((2, 2 * shares, group), dtype=torch.float32).unbind()
    part_acc = q.new_empty((2 * shares, group, head_dim), dtype=torch.float32)
    _decode[(shares,)](
        q, pages, slabs, positions, slots, page_table, work.stop_tile, work.shares,
        part_peak, part_mass, part_acc, out, q.stride(0), out.stride(0), page_table.stride(0),
        head_dim**-0.5 * math.log2(math.e),
        kv_heads, group, columns, head_dim, page_tokens, DECODE_KEYS, slabs is not None,
        1 if q.dtype == torch.float32 else STAGES, chained,
        num_warps=WARPS, maxnreg=REGISTERS, launch_pdl=chained,
    )  # fmt: skip
    _join[(len(work.joins), group)](
        work.joins, work.counts, part_peak, part_mass, part_acc, out, out.stride(0),
        group, head_dim, JOINED, chained, launch_pdl=chained,
    )  # fmt: skip
