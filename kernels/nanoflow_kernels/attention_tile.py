"""One tile of keys and values: part of a page, by bulk copies, or gathered token by token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def tiles(pages: Tensor, keys: int) -> tuple[bool, Tensor | TensorDescriptor]:
    """Whether pages [pages, 2, K, P, d] are whole tiles of so many keys, and what load_tile loads from."""
    page_tokens, head_dim = pages.shape[3:]
    if page_tokens % keys:
        return False, pages
    return True, TensorDescriptor.from_tensor(pages.view(-1, head_dim), [keys, head_dim])


@triton.jit
def load_tile(
    kv, table, tile, head, length,
    K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, TILED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """K and V [KEYS, D] of keys tile KEYS .. tile KEYS + KEYS - 1; V is zero from `length` on if MASKED, or gathered.

    kv: a descriptor of rows [pages 2 K P, D] where TILED (then pages are whole tiles), else a pointer. table: the
    slot's pages. What is behind keys from `length` on may be NaN, and their pages may be unset.
    """
    key = tile * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, D)
    if TILED:
        page = tl.load(table + tile * KEYS // PAGE, mask=tile * KEYS < length, other=0)
        row = (page * 2 * K + head) * PAGE + tile * KEYS % PAGE
        k = kv.load([row, 0])
        v = kv.load([row + K * PAGE, 0])
        if MASKED:
            v = tl.where((key < length)[:, None], v, 0.0)
    else:
        page = tl.load(table + key // PAGE, mask=key < length, other=0).to(tl.int64)
        row = (page * 2 * K + head) * PAGE + key % PAGE
        place = row[:, None] * D + lane[None, :]
        k = tl.load(kv + place, mask=(key < length)[:, None], other=0.0)
        v = tl.load(kv + place + K * PAGE * D, mask=(key < length)[:, None], other=0.0)
    return k, v
