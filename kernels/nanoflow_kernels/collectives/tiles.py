"""A matrix is exchanged by parts, one for each rank, and a part is worked on tile by tile.

A part is some of the rows, as many for each rank but the last ones, or some of the columns. In a buffer, a part is a
*region*: its rows lie at a stride that vector loads like.

Shape legend: T tokens, C columns of a part, n ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.collectives.peers import ALIGNMENT, Peers

VECTOR = 16  # elements: rows of a region begin at multiples of this


class Tile(NamedTuple):
    """Rows and columns of a tile, powers of two."""

    rows: int
    columns: int


def tile_of(rows: int, columns: int, elements: int) -> Tile:
    """The tile of so many elements, at most, that leaves the fewest of its lanes empty."""
    widths = [elements >> shift for shift in range(4)]
    width = min(widths, key=lambda width: (-(-columns // width) * width, -width))
    width = min(width, triton.next_power_of_2(columns))
    return Tile(min(elements // width, triton.next_power_of_2(rows)), width)


def region_stride(columns: int) -> int:
    """Elements from one row of a region to the next."""
    return -(-columns // VECTOR) * VECTOR


def check_room(kernel: str, peers: Peers, like: Tensor, regions: int, rows: int, columns: int) -> None:
    """Check that half a buffer holds so many regions.

    Raises:
        ValueError: says how large the buffers have to be.
    """
    needed = 2 * room(regions, rows, columns, like.element_size())
    if needed > peers.buffer_bytes:
        raise ValueError(f"{kernel}: peers: expected buffers of {needed} bytes or more, got {peers.buffer_bytes}")


def room(regions: int, rows: int, columns: int, element_size: int) -> int:
    """Bytes of half a buffer that holds so many regions."""
    return -(-regions * rows * region_stride(columns) * element_size // ALIGNMENT) * ALIGNMENT


def own_rows(tokens: int, peers: Peers) -> int:
    """The rows that this rank has of `tokens`: ceil(tokens / n), the last ranks fewer or none."""
    rows = -(-tokens // peers.ranks)
    return max(0, min(rows, tokens - peers.rank * rows))


@triton.jit
def tile_indices(tile, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(rows, columns) of a part's tile, the tiles of a row of them one after the other."""
    blocks = tl.cdiv(C, COLS)
    return tile // blocks * ROWS + tl.arange(0, ROWS), tile % blocks * COLS + tl.arange(0, COLS)


@triton.jit
def tile_mask(row, column, rows, columns):
    """Which elements of a tile the part has."""
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def offsets(row, column, stride):
    """Of a tile's elements, in elements."""
    return row.to(tl.int64)[:, None] * stride + column[None, :]


@triton.jit
def region_ptr(buffers_ptr, rank, half_offset, region, rows, stride, like_ptr):
    """Where a region of `rows` rows begins in the half of a rank's buffer, for elements as of like_ptr."""
    address = tl.load(buffers_ptr + rank) + half_offset
    begin = address.to(tl.pointer_type(like_ptr.dtype.element_ty))
    return tl.multiple_of(begin, 16) + region * rows.to(tl.int64) * stride
