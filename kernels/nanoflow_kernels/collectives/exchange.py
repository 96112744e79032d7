"""The exchange of parts: reduce-scatter, all-gather, and both at once, also with residual and RMS norm between them.

*Scattering writes, gathering reads.* A program writes its tiles of each part into the buffer of the rank that owns the
part; that rank sums what has come to it, in fp32 and in the order of ranks, so that the sum is one and the same
wherever and on however many SMs it is made. What is gathered, a rank puts into its own buffer, once, and the others
read it from there straight into their outputs.

Bytes, of a message of N on n ranks with f = (n - 1) / n: scattering reads fN and writes fN to peers; summing reads fN
from the own buffer and N/n of the input, and writes N/n; gathering writes N/n, reads fN from peers and writes fN. Over
the links go 2 fN, the least without multicast, and through the SMs 5 fN + 3 N/n. Had the input to be copied to the own
buffer for peers to read, the bytes were as many (the copy takes the place of the write to peers), but loads over a link
take microseconds, and few SMs cannot keep as many under way as fill it; nobody waits for a store. Gathering by writes
costs fN more, since outputs are not mapped for peers: what came would have to be copied to them. So it reads; the
loads of all peers are under way together. Reading the inputs of others in place would save fN, and would need every
activation in mapped memory and one more barrier, after which inputs may be overwritten.

Shape legend: T tokens, D columns of the whole row, C columns of a part, n ranks, t rows of one rank.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows
from nanoflow_kernels.collectives.barrier import begin_call, end_call, peer_barrier
from nanoflow_kernels.collectives.peers import MAX_PROGRAMS, Peers
from nanoflow_kernels.collectives.tiles import (
    Tile,
    check_room,
    offsets,
    region_ptr,
    region_stride,
    tile_indices,
    tile_mask,
    tile_of,
)
from nanoflow_kernels.grid import programs

# The loads that are under way are what keeps memory and links busy. An SM holds 1024 threads of 64 registers, each of
# which has up to four times 32 bytes under way before it stores any of them.
REGISTERS = 64  # of a thread, at most
TILE_BYTES, WARPS, PER_SM = 8192, 8, 4
ROW_WARPS, ROW_PER_SM = 16, 2  # where a tile is a row
AT_ONCE = 4  # tiles that are read before the first is stored


def tiles_at_once(ranks: int) -> tuple[int, int]:
    """(peers, tiles of each of them) whose reads are under way together; the peers in turns of almost as many."""
    others = max(1, ranks - 1)
    peers = -(-others // -(-others // AT_ONCE))
    return peers, max(1, AT_ONCE // others)


@triton.jit
def rows_of(part, T, rows, COLUMNS: tl.constexpr):
    """The rows of a part: with COLUMNS all, else `rows`, of the last parts fewer or none."""
    if COLUMNS:
        return T
    else:
        return tl.maximum(tl.minimum(T - part * rows, rows), 0)


@triton.jit
def part_ptr(matrix_ptr, part, rows, C, stride, COLUMNS: tl.constexpr):
    """Where a part of a matrix begins."""
    if COLUMNS:
        return matrix_ptr + part * C
    else:
        return matrix_ptr + part * rows.to(tl.int64) * stride


@triton.jit(do_not_specialize=["rank", "T", "rows"])
def _exchange(
    x_ptr, out_ptr, residual_ptr, weight_ptr, kept_ptr, buffers_ptr, pads_ptr, counters_ptr, abort_ptr,
    rank, T, rows, C, half_bytes, x_stride, out_stride, residual_stride, kept_stride, region_row, eps,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, SCATTER: tl.constexpr, GATHER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, PEERS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """With SCATTER, y = the ranks' sum of this rank's part of x, else y = x, which is this rank's part.
    With residual_ptr, kept = residual + y, and then y = kept / sqrt(mean(kept^2) + eps) * weight; tiles are rows.
    With GATHER, out = all ranks' y, else out = y.

    Of each part, programs have the same tiles in all three phases.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    epoch = begin_call(counters_ptr)
    half = epoch % 2 * half_bytes
    first, step, tiles = tl.program_id(0), tl.num_programs(0), tl.cdiv(rows, ROWS) * tl.cdiv(C, COLS)
    own_rows = rows_of(rank, T, rows, COLUMNS)
    gathered: tl.constexpr = RANKS if SCATTER else 0  # the region of a buffer that others read

    if SCATTER:
        for tile in range(first, tiles, step * TILES):
            for turn in tl.static_range(1, RANKS, PEERS):
                values = ()
                for one in tl.static_range(TILES * PEERS):
                    if turn + one % PEERS < RANKS:
                        peer = (rank + turn + one % PEERS) % RANKS
                        row, column = tile_indices(tile + one // PEERS * step, C, ROWS, COLS)
                        inside = tile_mask(row, column, rows_of(peer, T, rows, COLUMNS), C)
                        part = part_ptr(x_ptr, peer, rows, C, x_stride, COLUMNS)
                        values += (tl.load(part + offsets(row, column, x_stride), mask=inside, other=0),)  # type: ignore
                for one in tl.static_range(TILES * PEERS):
                    if turn + one % PEERS < RANKS:
                        peer = (rank + turn + one % PEERS) % RANKS
                        row, column = tile_indices(tile + one // PEERS * step, C, ROWS, COLS)
                        inside = tile_mask(row, column, rows_of(peer, T, rows, COLUMNS), C)
                        there = region_ptr(buffers_ptr, peer, half, rank, rows, region_row, x_ptr)
                        tl.store(there + offsets(row, column, region_row), values[one], mask=inside)
        peer_barrier(pads_ptr, abort_ptr, rank, epoch, 0, RANKS)

    own_x_ptr, own_out_ptr = x_ptr, out_ptr
    if SCATTER:
        own_x_ptr = part_ptr(x_ptr, rank, rows, C, x_stride, COLUMNS)
    if GATHER:
        own_out_ptr = part_ptr(out_ptr, rank, rows, C, out_stride, COLUMNS)
    for tile in range(first, tiles, step):
        row, column = tile_indices(tile, C, ROWS, COLS)
        inside = tile_mask(row, column, own_rows, C)
        y = tl.load(own_x_ptr + offsets(row, column, x_stride), mask=inside, other=0)
        if SCATTER:
            total = tl.zeros([ROWS, COLS], tl.float32)
            here = region_ptr(buffers_ptr, rank, half, 0, rows, region_row, x_ptr) + offsets(row, column, region_row)
            for peer in tl.static_range(RANKS):
                came = tl.load(here, mask=inside & (peer != rank), other=0, cache_modifier=".cg")
                total += tl.where(peer == rank, y, came).to(tl.float32)
                here += rows.to(tl.int64) * region_row
            y = total.to(dtype)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets(row, column, residual_stride), mask=inside, other=0)
            kept = (residual.to(tl.float32) + y.to(tl.float32)).to(dtype)  # the norm is of what is kept
            tl.store(kept_ptr + offsets(row, column, kept_stride), kept, mask=inside)
            s = kept.to(tl.float32)
            weight = tl.load(weight_ptr + column, mask=column < C, other=0).to(tl.float32)
            y = (s * (1 / tl.sqrt(tl.sum(s * s, 1) / C + eps))[:, None] * weight[None, :]).to(dtype)
        tl.store(own_out_ptr + offsets(row, column, out_stride), y, mask=inside)
        if GATHER:
            here = region_ptr(buffers_ptr, rank, half, gathered, rows, region_row, x_ptr)
            tl.store(here + offsets(row, column, region_row), y, mask=inside)

    if GATHER:
        peer_barrier(pads_ptr, abort_ptr, rank, epoch, 1, RANKS)
        for tile in range(first, tiles, step * TILES):
            for turn in tl.static_range(1, RANKS, PEERS):
                values = ()
                for one in tl.static_range(TILES * PEERS):
                    if turn + one % PEERS < RANKS:
                        peer = (rank + turn + one % PEERS) % RANKS
                        row, column = tile_indices(tile + one // PEERS * step, C, ROWS, COLS)
                        inside = tile_mask(row, column, rows_of(peer, T, rows, COLUMNS), C)
                        there = region_ptr(buffers_ptr, peer, half, gathered, rows, region_row, x_ptr)
                        there += offsets(row, column, region_row)
                        values += (tl.load(there, mask=inside, other=0, cache_modifier=".cg"),)  # type: ignore
                for one in tl.static_range(TILES * PEERS):
                    if turn + one % PEERS < RANKS:
                        peer = (rank + turn + one % PEERS) % RANKS
                        row, column = tile_indices(tile + one // PEERS * step, C, ROWS, COLS)
                        inside = tile_mask(row, column, rows_of(peer, T, rows, COLUMNS), C)
                        part = part_ptr(out_ptr, peer, rows, C, out_stride, COLUMNS)
                        tl.store(part + offsets(row, column, out_stride), values[one], mask=inside)
    end_call(counters_ptr, epoch)


def launch_exchange(
    kernel: str,
    x: Tensor,
    peers: Peers,
    out: Tensor,
    tokens: int,
    num_sms: int | None,
    *,
    columns: bool = False,
    scatter: bool = False,
    gather: bool = False,
    norm: tuple[Tensor, Tensor, Tensor, float] | None = None,
) -> None:
    """Launch the exchange for `kernel`, which has checked all shapes, on `tokens` rows of all ranks together.

    columns: parts are columns. norm: (residual, weight, kept, eps) of the kernel, with scatter.

    Raises:
        ValueError: names the operand whose strides, dtype or device is not so, or num_sms if not positive; or says how
            large the peers' buffers have to be.
    """
    check_rows(kernel, x=x, out=out)
    check_dtype(kernel, x.dtype, out=out)
    width = min(x.shape[1], out.shape[1])  # of a part
    rows = tokens if columns else -(-tokens // peers.ranks)
    check_room(kernel, peers, x, (peers.ranks if scatter else 0) + gather, rows, width)
    if tokens == 0 or width == 0:
        return
    residual, weight, kept, eps = norm or (None, None, None, 0.0)
    tile = Tile(1, triton.next_power_of_2(width)) if norm else tile_of(rows, width, TILE_BYTES // x.element_size())
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    grid = min(programs(tiles, num_sms, x.device, per_sm=ROW_PER_SM if norm else PER_SM), MAX_PROGRAMS)
    _exchange[(grid,)](
        x, out, residual, weight, kept, peers.buffers, peers.pads, peers.counters, peers.abort,
        peers.rank, tokens, rows, width, peers.half_bytes, x.stride(0), out.stride(0),
        0 if residual is None else residual.stride(0), 0 if kept is None else kept.stride(0),
        region_stride(width), eps,
        peers.ranks, columns, scatter, gather, tile.rows, tile.columns, *tiles_at_once(peers.ranks),
        num_warps=ROW_WARPS if norm else WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
