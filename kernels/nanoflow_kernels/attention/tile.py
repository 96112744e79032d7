"""Both attention kernels read keys and values a tile at a time; this module reads one and applies queries to it.

A tile that is full and lies in one page is read by a bulk copy; any other is gathered token by token.

Shape legend: M rows of queries, K kv heads, P tokens a page, d (D) head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.interpreted import INTERPRETED

# The running maximum m before the first tile: finite, so that the difference of two maxima is never NaN.
LOWEST = tl.constexpr(-1e30)


def kv_rows_descriptor(pages: Tensor, keys: int) -> TensorDescriptor | None:
    """Descriptor by which bulk copies read tiles of `keys` rows of pages [pages, 2, K, P, d].

    None where the pages are not whole tiles (P is no multiple of `keys`): tiles are gathered then.
    """
    page_tokens, head_dim = pages.shape[3:]
    if page_tokens % keys:
        return None
    return TensorDescriptor.from_tensor(pages.view(-1, head_dim), [keys, head_dim])


def kv_pages_descriptor(pages: Tensor, keys: int) -> TensorDescriptor | None:
    """Descriptor by which bulk copies read up to `keys` rows of one head in one page [P, d] of pages [.., 2, K, P, d].

    Rows before the page's first are read as zeros. None where the pages are not whole tiles.
    """
    page_tokens, head_dim = pages.shape[3:]
    if page_tokens % keys:
        return None
    return TensorDescriptor.from_tensor(pages.view(-1, page_tokens, head_dim), [1, keys, head_dim])


@triton.jit
def unpacked(packed):
    """The e4m3 at even and those at odd columns, each [ROWS, COLUMNS] fp16, of [ROWS, COLUMNS] int16 that hold two.

    Tiles of 16 bits come out of shared memory transposed, those of 8 do not; the tensor cores then get fp16, into which
    the device converts two e4m3 at a time, exactly.
    """
    if INTERPRETED:
        even, odd = (packed & 0xFF).to(tl.uint8), ((packed >> 8) & 0xFF).to(tl.uint8)
        even, odd = even.to(tl.float8e4nv, bitcast=True), odd.to(tl.float8e4nv, bitcast=True)
        return even.to(tl.float16), odd.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 evens, odds;
            prmt.b32 sorted, $2, 0, 0x3120;
            mov.b32 {evens, odds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, evens;
            cvt.rn.f16x2.e4m3x2 $1, odds;
            }""",
            "=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def power_of_two(largest):
    """The power of two up to `largest` >= 0: what divided by it fits fp16, exactly so if it has fp16's mantissa."""
    bits = tl.maximum(largest, 1e-30).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def skipped_tiles(length, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """Tiles of keys that a row does not see whose last key is at length - 1: those before its window, if it has one."""
    if WINDOW:
        return tl.maximum(length - WINDOW, 0) // KEYS
    else:
        return length * 0


@triton.jit
def bulk_tile(
    kv_desc, table_ptr, tile, head, length,
    K: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """K and V [KEYS, D] of the keys tile KEYS .. tile KEYS + KEYS - 1, all before `length`.

    kv_desc: a descriptor of [pages 2 K P, D]. table_ptr: the slot's row of the page table.
    """
    page = tl.load(table_ptr + tile * KEYS // PAGE, mask=tile * KEYS < length, other=0)
    kv_row = (page * 2 * K + head) * PAGE + tile * KEYS % PAGE
    return kv_desc.load([kv_row, 0]), kv_desc.load([kv_row + K * PAGE, 0])


@triton.jit
def gathered_tile(
    pages_ptr, table_ptr, head, key, is_real,
    K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """K and V [KEYS, D] of the keys at positions `key` [KEYS], zero where not `is_real`: they may be NaN or nowhere."""
    page = tl.load(table_ptr + key // PAGE, mask=is_real, other=0).to(tl.int64)
    kv_row = (page * 2 * K + head) * PAGE + key % PAGE
    offset = kv_row[:, None] * D + tl.arange(0, D)[None, :]
    k = tl.load(pages_ptr + offset, mask=is_real[:, None], other=0.0)
    return k, tl.load(pages_ptr + offset + K * PAGE * D, mask=is_real[:, None], other=0.0)


@triton.jit
def attend(
    m_i, l_i, acc, queries, position, kv, table_ptr, tile, head, length, scale_log2,
    PARTS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, KEYS: tl.constexpr, BULK: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """Take one more tile of keys into the online softmax:

        m' = max(m, max_j s_j),  alpha = 2^(m - m'),  p_j = 2^(s_j - m')
        l' = alpha l + sum_j p_j,  acc' = alpha acc + sum_j p_j v_j

    where s = q k^T log2(e) / sqrt(d); the result is acc / l after the last tile.

    m_i [M], l_i [M], acc [M, D], queries: a tuple of PARTS of [M, D] of the keys' dtype, whose sum they are and whose
    rows stand at `position` [M]. kv: with BULK a descriptor as in bulk_tile, and every row sees all keys of the tile;
    else the pages, whose keys are gathered and masked, by WINDOW too if that is not 0.
    Reference: Dao et al., "FlashAttention", NeurIPS 2022; Milakov and Gimelshein, "Online normalizer calculation for
    softmax", 2018.
    """
    key = tile * KEYS + tl.arange(0, KEYS)
    if BULK:
        k, v = bulk_tile(kv, table_ptr, tile, head, length, K, PAGE, KEYS)
    else:
        k, v = gathered_tile(kv, table_ptr, head, key, key < length, K, D, PAGE)
    s = tl.dot(queries[0], k.T, input_precision="ieee")
    for part in tl.static_range(1, PARTS):
        s = tl.dot(queries[part], k.T, s)
    if v.dtype == tl.float8e4nv:
        v = v.to(tl.float16)  # exact, and p has the bits of fp16
    if not BULK:
        visible = key[None, :] <= position[:, None]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        s = tl.where(visible, s, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return m_new, l_i * alpha + tl.sum(p, 1), acc
