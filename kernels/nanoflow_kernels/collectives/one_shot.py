"""The one-shot all-reduce, for small messages: every rank gets all inputs, and sums them itself.

A program writes its tiles of the input into the buffers of all others, waits for theirs, and sums what has come. A
write takes one way over the link, where a read would take two after its signal's one; what is small is bound by that.

Bytes, of a message of N on n ranks: n N are read, (n - 1) N written to peers, n N read and N written. The two-shot form
(exchange.py) moves a fraction of that over the links, but its ranks wait for each other twice.

Shape legend: T tokens, D columns, n ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.collectives.barrier import begin_call, end_call, peer_barrier
from nanoflow_kernels.collectives.peers import MAX_PROGRAMS, Peers
from nanoflow_kernels.collectives.tiles import (
    check_room,
    offsets,
    region_ptr,
    region_stride,
    tile_indices,
    tile_mask,
    tile_of,
)
from nanoflow_kernels.grid import programs

TILE_BYTES = 4096  # a vector of 16 bytes a thread: small messages shall spread over many SMs
PER_SM, WARPS, REGISTERS = 4, 8, 64  # programs, warps of each, registers of a thread: what an SM has


@triton.jit(do_not_specialize=["rank", "T"])
def _all_reduce(
    x_ptr, out_ptr, buffers_ptr, pads_ptr, counters_ptr, abort_ptr,
    rank, T, D, half_bytes, x_stride, out_stride, region_row,
    RANKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """out = the ranks' sum of x, in fp32 and in the order of ranks; the region of a buffer is that of a rank's x."""
    epoch = begin_call(counters_ptr)
    half = epoch % 2 * half_bytes
    first, step, tiles = tl.program_id(0), tl.num_programs(0), tl.cdiv(T, ROWS) * tl.cdiv(D, COLS)
    for tile in range(first, tiles, step):
        row, column = tile_indices(tile, D, ROWS, COLS)
        inside = tile_mask(row, column, T, D)
        x = tl.load(x_ptr + offsets(row, column, x_stride), mask=inside)
        for turn in tl.static_range(1, RANKS):
            there = region_ptr(buffers_ptr, (rank + turn) % RANKS, half, rank, T, region_row, x_ptr)
            tl.store(there + offsets(row, column, region_row), x, mask=inside)
    peer_barrier(pads_ptr, abort_ptr, rank, epoch, 0, RANKS)
    for tile in range(first, tiles, step):
        row, column = tile_indices(tile, D, ROWS, COLS)
        inside = tile_mask(row, column, T, D)
        x = tl.load(x_ptr + offsets(row, column, x_stride), mask=inside, other=0)
        total = tl.zeros([ROWS, COLS], tl.float32)
        for peer in tl.static_range(RANKS):
            here = region_ptr(buffers_ptr, rank, half, peer, T, region_row, x_ptr)
            came = tl.load(
                here + offsets(row, column, region_row), mask=inside & (peer != rank), other=0, cache_modifier=".cg"
            )
            total += tl.where(peer == rank, x, came).to(tl.float32)
        tl.store(out_ptr + offsets(row, column, out_stride), total.to(out_ptr.dtype.element_ty), mask=inside)
    end_call(counters_ptr, epoch)


def all_reduce_one_shot(x: Tensor, peers: Peers, *, out: Tensor, num_sms: int | None = None) -> None:
    """The ranks' sum, each rank summing all of it: x [T, D] -> [T, D], of one floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive; or
            says how large the peers' buffers have to be.
    """
    kernel = "all_reduce_one_shot"
    check_rows(kernel, x=x, out=out)
    check_dtype(kernel, x.dtype, out=out)
    check_shape(kernel, "out", out, *x.shape)
    tokens, width = x.shape
    check_room(kernel, peers, x, peers.ranks, tokens, width)
    if tokens == 0 or width == 0:
        return
    tile = tile_of(tokens, width, TILE_BYTES // x.element_size())
    tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(width, tile.columns)
    grid = min(programs(tiles, num_sms, x.device, per_sm=PER_SM), MAX_PROGRAMS)
    _all_reduce[(grid,)](
        x, out, peers.buffers, peers.pads, peers.counters, peers.abort,
        peers.rank, tokens, width, peers.half_bytes, x.stride(0), out.stride(0), region_stride(width),
        peers.ranks, tile.rows, tile.columns,
        num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
