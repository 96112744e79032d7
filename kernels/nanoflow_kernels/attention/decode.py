"""Attention of single tokens (decodes), with the keys of a request split over programs (split-KV).

The tiles of keys of all (row, kv head) pairs, one pair after the other, are dealt out to the programs in equal work
items. A pair that a work item cuts leaves partial results (m, l and acc) in a workspace, and a second kernel merges
them. Both kernels are launched with PDL (pdl.py) where the batch is small.

In the tensor cores' tile the keys are rows and the query heads of a group are columns: a tile may have 8 columns, but
no fewer than 16 rows, so a group of few heads leaves less of it empty. A program is one warp: maxima and sums are found
within it and nothing waits for another warp. Six programs an SM, each with two tiles of keys on their way, keep the
memory busy even where few SMs may be used.

Shape legend: T tokens, H query heads, K kv heads, G = H / K query heads of a group (GP: padded to the tile's columns),
d (D) head_dim, P (PAGE) tokens a page, W work items.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.attention.tile import (
    LOWEST,
    gathered_tile,
    kv_pages_descriptor,
    power_of_two,
    skipped_tiles,
    unpacked,
)
from nanoflow_kernels.pdl import launch_dependents, prefetch_l2, wait_for_earlier

FEWEST_COLUMNS = 8  # of the tensor cores' tile
# Of those tried on H200 these were as fast as any, on 32 of its SMs and on all. Prefetching tiles into the L2 cache
# further ahead, or one loop over all pairs of a work item, was slower.
# A tile's page is looked up two iterations before its copy is waited for, and the copy begins two before its use.
DECODE_KEYS, FP8_DECODE_KEYS = 32, 64  # of a tile
DECODE_PER_SM = 6  # programs
DECODE_WARPS, DECODE_STAGES = 1, 5
DECODE_REGISTERS = 255  # of a thread, at most: an SM has them for six programs; the assembler's default of 128 spills
MERGED_BY_WARP = 1024  # values
FEWEST_MERGED, MOST_MERGED = 4, 64  # partial results of a query head at once


def decode_keys(pages: Tensor) -> int:
    """Keys of a tile of pages [.., P, d]: bulk copies bring as many bytes of e4m3 as of others, if P allows it."""
    is_narrow = pages.dtype == torch.float8_e4m3fn and pages.shape[-2] % FP8_DECODE_KEYS == 0
    return FP8_DECODE_KEYS if is_narrow else DECODE_KEYS


def merged_at_once(pairs: int, items: int) -> int:
    """Partial results that a merge takes at once, where so many work items share so many pairs equally."""
    parts = triton.cdiv(items, pairs) + 1  # a pair begins and ends anywhere in an item
    return min(max(int(triton.next_power_of_2(parts)), FEWEST_MERGED), MOST_MERGED)


@dataclass(frozen=True)
class DecodeWork:
    """How the keys that the decode rows of a batch read are dealt out. Tensors are int32, on the device.

    tile_prefix_sum [T]: the inclusive prefix sum of the rows' key tiles (0 tiles in rows of prompt chunks).
    work_items [W, 4]: the row, kv head and tile at which a work item begins, and how many tiles it has.
    merges [.., 4]: the row and kv head of each pair that is cut, the work item in which it begins, and in how many it
    lies; only the first counts[2] are set.
    counts [3]: key tiles, query tiles, merges.
    """

    tile_prefix_sum: Tensor
    work_items: Tensor
    merges: Tensor
    counts: Tensor


@triton.jit
def _load_queries(q_ptr, offset, mask, PARTS: tl.constexpr):
    """(queries, power): a tuple of the PARTS parts of queries [d / PARTS, GP], divided by a power of two.

    One part is as it is stored, its power 1. Of two, one has the even and one the odd dimensions, in fp16.
    """
    first = tl.load(q_ptr + offset, mask=mask, other=0.0)
    if PARTS == 1:
        return (first,), 1.0
    else:
        even, odd = first.to(tl.float32), tl.load(q_ptr + offset + 1, mask=mask, other=0.0).to(tl.float32)
        power = power_of_two(tl.max(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1), 0))
        return ((even * (1 / power)).to(tl.float16), (odd * (1 / power)).to(tl.float16)), power


@triton.jit
def _decode(
    q_ptr, pages_ptr, kv_desc, kv_scales_ptr, positions_ptr, slots_ptr, page_table_ptr, tile_prefix_sum_ptr,
    work_items_ptr, partial_m_ptr, partial_l_ptr, partial_acc_ptr, out_ptr,
    q_stride, out_stride, page_table_stride, scale_log2,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, BULK: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """o = softmax(q k^T / sqrt(d)) v over a work item's tiles of keys, by the recurrences of the online softmax:

        m' = max(m, max_j s_j),  alpha = 2^(m - m'),  p_j = 2^(s_j - m')
        l' = alpha l + sum_j p_j,  acc' = alpha acc + sum_j p_j v_j,  o = acc / l

    where s = k q^T log2(e) / sqrt(d) is transposed: keys are rows, query heads are columns. With a WINDOW that is not
    0, a row sees its last WINDOW keys; its tiles count from the first of which it sees one.

    Of 16 and 32 bits, k and v have all dimensions in one part. Of 8, they have PARTS = 2: pages hold int16, each the
    e4m3 of an even and an odd dimension, of k / kv_scales[0] and v / kv_scales[1] (see `unpacked`).

    References: Dao et al., "FlashAttention", NeurIPS 2022 (m, l, acc); Dao et al., "Flash-Decoding", 2023 (split KV);
    Osama et al., "Stream-K", PPoPP 2023 (equal work items, wherever their ends fall).
    """
    launch_dependents(PDL)
    program = tl.program_id(0)
    item_ptr = work_items_ptr + 4 * program
    row, head, first_tile = tl.load(item_ptr).to(tl.int64), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    tiles_left = tl.load(item_ptr + 3)
    length = tl.load(positions_ptr + row) + 1
    table_ptr = page_table_ptr + tl.load(slots_ptr + row).to(tl.int64) * page_table_stride
    W: tl.constexpr = D // PARTS  # elements of a row of pages
    group, dim = tl.arange(0, GP), PARTS * tl.arange(0, W)
    k_scale, v_scale = 1.0, 1.0
    if kv_scales_ptr is not None:
        k_scale, v_scale = tl.load(kv_scales_ptr), tl.load(kv_scales_ptr + 1)
    in_group = (group < G)[None, :]
    offset = group[None, :] * D + dim[:, None]
    # Only programs with work wait: as long as one of them waits, the kernel has not ended, so the dependent kernel's
    # own wait holds it back as well.
    if tiles_left > 0:
        if PDL and BULK:
            first_key = (first_tile + skipped_tiles(length, WINDOW, KEYS)) * KEYS
            page = tl.load(table_ptr + first_key // PAGE, mask=first_key < length, other=0).to(tl.int64)
            kv_row = (page * 2 * K + head) * PAGE + first_key % PAGE + tl.arange(0, KEYS)
            prefetch_l2(pages_ptr + kv_row * W, 2 * W)
            prefetch_l2(pages_ptr + (kv_row + K * PAGE) * W, 2 * W)
        wait_for_earlier(PDL)
    queries, power = _load_queries(q_ptr + row * q_stride + head * G * D, offset, in_group & (tiles_left > 0), PARTS)
    while tiles_left > 0:
        skipped = skipped_tiles(length, WINDOW, KEYS)
        num_tiles = tl.maximum(tl.cdiv(length, KEYS) - skipped, 1)  # padding has one tile, of no keys
        stop_tile = tl.minimum(num_tiles, first_tile + tiles_left)
        m_i = tl.full([GP], LOWEST, tl.float32)
        l_i = tl.zeros([KEYS, GP], tl.float32)  # summed over keys at the end: until then no thread needs another's
        acc = (tl.zeros([W, GP], tl.float32),) * PARTS
        scale = scale_log2 * k_scale * power
        for tile in tl.range(skipped + first_tile, skipped + stop_tile, num_stages=STAGES):
            # The last tile ends with the last key: it repeats keys of the tile before, and has zeros before its page.
            begin = tl.minimum(length, (tile + 1) * KEYS) - KEYS
            key = begin + tl.arange(0, KEYS)
            is_new = key >= tile * KEYS
            if BULK:
                page_number = tile * KEYS // PAGE
                kv_page = tl.load(table_ptr + page_number, mask=tile * KEYS < length, other=0) * 2 * K + head
                k = tl.reshape(kv_desc.load([kv_page, begin - page_number * PAGE, 0]), (KEYS, W))
                v = tl.reshape(kv_desc.load([kv_page + K, begin - page_number * PAGE, 0]), (KEYS, W))
            else:
                k, v = gathered_tile(pages_ptr, table_ptr, head, key, is_new, K, W, PAGE)
            if PARTS == 1:
                s = tl.dot(k, queries[0], input_precision="ieee")
            else:
                even, odd = unpacked(k)
                s = tl.dot(odd, queries[1], tl.dot(even, queries[0]))
            if WINDOW:
                is_new = is_new & (key >= length - WINDOW)
            s = tl.where(is_new[:, None], s, -float("inf"))
            m_new = tl.maximum(m_i, tl.max(s, 0) * scale)
            p = tl.exp2(s * scale - m_new[None, :])
            alpha = tl.exp2(m_i - m_new)
            if PARTS == 1:
                acc = (tl.dot(v.T, p.to(v.dtype), acc[0] * alpha[None, :], input_precision="ieee"),)
            else:
                even, odd = unpacked(v)
                weights = p.to(tl.float16)
                acc = (
                    tl.dot(even.T, weights, acc[0] * alpha[None, :]),
                    tl.dot(odd.T, weights, acc[1] * alpha[None, :]),
                )
            l_i = l_i * alpha[None, :] + p
            m_i = m_new
        l_i = tl.sum(l_i, 0)

        # A work item has at most one pair that began before it, and one that begins in it and goes on behind it.
        is_whole, partial = stop_tile - first_tile == num_tiles, (2 * program + (first_tile == 0).to(tl.int32)) * G
        out_row_ptr = out_ptr + row * out_stride + head * G * D
        tiles_left -= stop_tile - first_tile
        first_tile = 0
        head += 1
        if (head == K) & (tiles_left > 0):
            head = 0
            row += 1
            while tl.load(tile_prefix_sum_ptr + row) == tl.load(tile_prefix_sum_ptr + row - 1):  # a row of a chunk
                row += 1
            length = tl.load(positions_ptr + row) + 1
            table_ptr = page_table_ptr + tl.load(slots_ptr + row).to(tl.int64) * page_table_stride
        queries, power = _load_queries(
            q_ptr + row * q_stride + head * G * D, offset, in_group & (tiles_left > 0), PARTS
        )
        if is_whole:
            for part in tl.static_range(PARTS):
                o = acc[part] * v_scale / tl.maximum(l_i, 1e-30)[None, :]
                tl.store(out_row_ptr + offset + part, o.to(out_ptr.dtype.element_ty), mask=in_group)
        else:
            tl.store(partial_m_ptr + partial + group, m_i, mask=group < G)
            tl.store(partial_l_ptr + partial + group, l_i, mask=group < G)
            for part in tl.static_range(PARTS):
                tl.store(partial_acc_ptr + partial * D + offset + part, acc[part] * v_scale, mask=in_group)


@triton.jit
def _merge(
    merges_ptr, counts_ptr, partial_m_ptr, partial_l_ptr, partial_acc_ptr, out_ptr, out_stride,
    G: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """o = sum_i 2^(m_i - m) acc_i / sum_i 2^(m_i - m) l_i over the partial results i of a pair, with m = max_i m_i.

    Program (n, g) merges query head g of pair n of those that are cut, if there are so many.
    Reference: Dao et al., "Flash-Decoding", 2023.
    """
    launch_dependents(PDL)
    merge_ptr = merges_ptr + 4 * tl.program_id(0)
    exists = tl.program_id(0) < tl.load(counts_ptr + 2)
    row, head = tl.load(merge_ptr, mask=exists, other=0).to(tl.int64), tl.load(merge_ptr + 1, mask=exists, other=0)
    first_item, num_parts = tl.load(merge_ptr + 2, mask=exists, other=0), tl.load(merge_ptr + 3, mask=exists, other=0)
    wait_for_earlier(PDL)
    if exists:
        group, dim = tl.program_id(1), tl.arange(0, D)
        m_i = tl.cast(LOWEST, tl.float32)
        l_i = tl.cast(0, tl.float32)
        acc = tl.zeros([D], tl.float32)
        for begin in range(0, num_parts, PARTS):
            part = begin + tl.arange(0, PARTS)
            is_part = part < num_parts
            # A work item has two places: 0 for a pair that began before it, 1 for one that begins in it and goes on.
            partial = 2 * (first_item + part) + (part == 0).to(tl.int32)
            offset = partial * G + group
            part_m = tl.load(partial_m_ptr + offset, mask=is_part, other=LOWEST)
            part_l = tl.load(partial_l_ptr + offset, mask=is_part, other=0.0)
            part_acc = tl.load(partial_acc_ptr + offset[:, None] * D + dim[None, :], mask=is_part[:, None], other=0.0)
            m_new = tl.maximum(m_i, tl.max(part_m, 0))
            alpha, part_alpha = tl.exp2(m_i - m_new), tl.exp2(part_m - m_new)
            l_i = l_i * alpha + tl.sum(part_l * part_alpha, 0)
            acc = acc * alpha + tl.sum(part_acc * part_alpha[:, None], 0)
            m_i = m_new
        o = acc / tl.maximum(l_i, 1e-30)
        tl.store(out_ptr + row * out_stride + (head * G + group) * D + dim, o.to(out_ptr.dtype.element_ty))


def decode(
    q: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    kv_scales: Tensor | None,
    work: DecodeWork,
    *,
    window: int,
    pdl: bool,
    out: Tensor,
) -> None:
    """Compute the decode rows of a batch, and zeros where it is padded; `attention` has checked the operands.

    q [T, H d], pages [pages, 2, K, P, d], positions [T], slots [T], page_table [S, N], kv_scales [2] fp32 with pages
    of e4m3 -> out [T, H d]; int32, and else one floating dtype. `pdl`: launch with PDL, so that `work` and the ints
    must be older than the kernel before.
    """
    _, _, kv_heads, page_tokens, head_dim = pages.shape
    keys, parts = decode_keys(pages), 1 if kv_scales is None else 2
    if parts == 2:
        pages = pages.view(torch.int16)
    kv_desc = kv_pages_descriptor(pages, keys)
    group = q.shape[1] // head_dim // kv_heads
    columns = max(FEWEST_COLUMNS, triton.next_power_of_2(group))
    items = len(work.work_items)
    partial_m, partial_l = q.new_empty((2, 2 * items, group), dtype=torch.float32).unbind()
    partial_acc = q.new_empty((2 * items, group, head_dim), dtype=torch.float32)
    _decode[(items,)](
        q, pages, kv_desc, kv_scales, positions, slots, page_table, work.tile_prefix_sum, work.work_items,
        partial_m, partial_l, partial_acc, out, q.stride(0), out.stride(0), page_table.stride(0),
        head_dim**-0.5 * math.log2(math.e),
        kv_heads, group, columns, head_dim, page_tokens, keys, parts, kv_desc is not None,
        window, 1 if pages.dtype == torch.float32 else DECODE_STAGES, pdl,
        num_warps=DECODE_WARPS, maxnreg=DECODE_REGISTERS, launch_pdl=pdl,
    )  # fmt: skip
    merged = merged_at_once(len(q) * kv_heads, items)
    _merge[(len(work.merges), group)](
        work.merges, work.counts, partial_m, partial_l, partial_acc, out, out.stride(0),
        group, head_dim, merged, pdl, num_warps=min(4, max(1, merged * head_dim // MERGED_BY_WARP)), launch_pdl=pdl,
    )  # fmt: skip
