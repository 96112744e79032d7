"""One tile of keys and values: by bulk copies where it is part of a page and full, or gathered token by token; and what
rows of queries make of it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOWEST = tl.constexpr(-1e30)  # a peak before the first tile: finite, so that differences of peaks are never NaN


def bulk_tiles(pages: Tensor, keys: int) -> TensorDescriptor | None:
    """What bulk copies read tiles of so many keys from; None where pages [pages, 2, K, P, d] are not whole tiles."""
    page_tokens, head_dim = pages.shape[3:]
    if page_tokens % keys:
        return None
    return TensorDescriptor.from_tensor(pages.view(-1, head_dim), [keys, head_dim])


@triton.jit
def bulk_tile(
    rows, table, tile, head, length,
    K: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """K and V [KEYS, D] of keys tile KEYS .. tile KEYS + KEYS - 1, all before `length`.

    rows: a descriptor of [pages 2 K P, D]. table: the slot's pages.
    """
    page = tl.load(table + tile * KEYS // PAGE, mask=tile * KEYS < length, other=0)
    row = (page * 2 * K + head) * PAGE + tile * KEYS % PAGE
    return rows.load([row, 0]), rows.load([row + K * PAGE, 0])


@triton.jit
def gathered_tile(
    pages, table, head, key, real,
    K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """K and V [KEYS, D] of the keys at these positions [KEYS], zero where not `real`: such may be NaN, or nowhere."""
    page = tl.load(table + key // PAGE, mask=real, other=0).to(tl.int64)
    row = (page * 2 * K + head) * PAGE + key % PAGE
    place = row[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(pages + place, mask=real[:, None], other=0.0)
    return k, tl.load(pages + place + K * PAGE * D, mask=real[:, None], other=0.0)


@triton.jit
def attend(
    peak, mass, acc, queries, at, kv, table, tile, head, length, scale,
    K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """One more tile of keys: peak [M], mass [M], acc [M, D], queries [M, D], whose rows stand at positions `at` [M].

    BULK: all of its keys are before every row; others are gathered.
    """
    key = tile * KEYS + tl.arange(0, KEYS)
    if BULK:
        k, v = bulk_tile(kv, table, tile, head, length, K, PAGE, KEYS)
    else:
        k, v = gathered_tile(kv, table, head, key, key < length, K, D, PAGE)
    s = tl.dot(queries, k.T, input_precision="ieee")
    if not BULK:
        s = tl.where(key[None, :] <= at[:, None], s, -float("inf"))
    highest = tl.maximum(peak, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - highest[:, None])
    fade = tl.exp2(peak - highest)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return highest, mass * fade + tl.sum(p, 1), acc
