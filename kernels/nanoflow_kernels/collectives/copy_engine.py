"""CopyEngine gathers rows or columns without SMs: copy engines bring them, and a barrier takes one warp.

A rank puts its part into its own buffer, waits for the others, copies their parts into its output, and waits again,
after which the parts may be overwritten. Copies are told their addresses when they are issued or captured, so calls
cannot take turns with two places as those of kernels do; hence the second barrier, which is cheap beside messages that
are worth the copies.

Bytes, of a message of N on n ranks with f = (n - 1) / n: 2 N/n and 2 N/n to put the own part into the buffer and into
the output, fN read from peers and fN written.

Shape legend: T tokens, D columns of the whole row, n ranks, t rows of one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.collectives.barrier import begin_call, end_call, peer_barrier
from nanoflow_kernels.collectives.peers import Peers
from nanoflow_kernels.collectives.tiles import own_rows

# (to address, bytes from row to row, from address, bytes from row to row, bytes of a row, rows)
CopyRows = Callable[[int, int, int, int, int, int], None]


@triton.jit(do_not_specialize=["rank"])
def _barrier(pads_ptr, counters_ptr, abort_ptr, rank, RANKS: tl.constexpr):
    """A call that only waits for all ranks."""
    epoch = begin_call(counters_ptr)
    peer_barrier(pads_ptr, abort_ptr, rank, epoch, 0, RANKS)
    end_call(counters_ptr, epoch)


def copy_rows_on_device(to: int, to_stride: int, source: int, source_stride: int, row_bytes: int, rows: int) -> None:
    """Issue a copy on the current stream; its memory may be that of other GPUs.

    Raises:
        RuntimeError: the driver refused it, and how it calls the reason.
    """
    driver = import_module("cuda.bindings.driver")  # it is there where a GPU is
    copy = driver.CUDA_MEMCPY2D()
    copy.srcMemoryType = copy.dstMemoryType = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
    copy.srcDevice, copy.srcPitch = source, source_stride
    copy.dstDevice, copy.dstPitch = to, to_stride
    copy.WidthInBytes, copy.Height = row_bytes, rows
    (outcome,) = driver.cuMemcpy2DAsync(copy, torch.cuda.current_stream().cuda_stream)
    if outcome != 0:  # CUDA_SUCCESS
        raise RuntimeError(f"cuMemcpy2DAsync: {outcome.name}")


class CopyEngine:
    """All-gathers of one rank. `peers` is for these alone: no other kernels may use its buffers."""

    def __init__(self, peers: Peers, copy_rows: CopyRows = copy_rows_on_device) -> None:
        self._peers, self._copy = peers, copy_rows
        self._buffers: list[int] = peers.buffers.tolist()

    def all_gather_rows(self, x: Tensor, *, out: Tensor) -> None:
        """The ranks' rows one below the other: x [t, D] -> [T, D], of one dtype; t = ceil(T / n), on the last less.

        Raises:
            ValueError: names the operand whose shape, strides, dtype or device is not so, or says how large the peers'
                buffers have to be.
        """
        peers, tokens, size = self._peers, len(out), -(-len(out) // self._peers.ranks)
        check_shape("all_gather_rows", "x", x, own_rows(tokens, peers), out.shape[1])
        parts = [out[min(rank * size, tokens) : min((rank + 1) * size, tokens)] for rank in range(peers.ranks)]
        self._gather("all_gather_rows", x, out, parts)

    def all_gather_columns(self, x: Tensor, *, out: Tensor) -> None:
        """The ranks' columns side by side: x [T, D / n] -> [T, D], of one dtype.

        Raises:
            ValueError: as of `all_gather_rows`.
        """
        check_shape("all_gather_columns", "out", out, len(x), self._peers.ranks * x.shape[1])
        self._gather("all_gather_columns", x, out, list(out.chunk(self._peers.ranks, 1)))

    def _gather(self, kernel: str, x: Tensor, out: Tensor, parts: list[Tensor]) -> None:
        peers, element = self._peers, x.element_size()
        check_rows(kernel, x=x, out=out)
        check_dtype(kernel, x.dtype, out=out)
        row_bytes = x.shape[1] * element
        needed = len(parts[0]) * row_bytes
        if needed > peers.buffer_bytes:
            raise ValueError(f"{kernel}: peers: expected buffers of {needed} bytes or more, got {peers.buffer_bytes}")
        if needed == 0:
            return
        mine, x_stride = self._buffers[peers.rank], x.stride(0) * element
        if len(x):
            self._copy(mine, row_bytes, x.data_ptr(), x_stride, row_bytes, len(x))
        self._wait_for_all()
        for turn in range(peers.ranks):  # from itself on, so that not all read from one
            rank = (peers.rank + turn) % peers.ranks
            part, source, stride = parts[rank], self._buffers[rank], row_bytes
            if turn == 0:
                source, stride = x.data_ptr(), x_stride
            if len(part):
                self._copy(part.data_ptr(), part.stride(0) * element, source, stride, row_bytes, len(part))
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        peers = self._peers
        _barrier[(1,)](peers.pads, peers.counters, peers.abort, peers.rank, peers.ranks, num_warps=1)
