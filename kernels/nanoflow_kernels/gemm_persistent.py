"""Dense products by a persistent kernel, whose grid fits the granted SMs; also with SwiGLU in the epilogue.

Each program computes tile after tile of the result until none is left. SwiGLU is applied in the epilogue, so that gates
and ups never reach memory: row 2 i of the weight is gate i and row 2 i + 1 up i, which then stand side by side in the
registers of one thread.

Shape legend: T tokens, N rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.grid import device_sms, programs
from nanoflow_kernels.swiglu import swiglu


class GemmTile(NamedTuple):
    """What a program computes at a time, and how."""

    rows: int  # of x
    columns: int  # of x weight^T
    depth: int  # columns of x and weight that are read at a time
    warps: int
    stages: int  # reads on their way
    rate: float  # results a time, where those of the first of TILES are 1


# On H200 the first takes 716 us for Llama-3-8B's 2048 tokens x gate_up with SwiGLU, cuBLAS 717 us without
# (benchmarks/results/kernels_h200.json); the others leave less of the SMs idle where its tiles do not fill the grid.
TILES = (
    GemmTile(128, 256, 64, warps=8, stages=3, rate=1.0),
    GemmTile(128, 128, 64, warps=8, stages=5, rate=0.93),
    GemmTile(64, 256, 64, warps=4, stages=4, rate=0.87),
)
FP32_TILE = GemmTile(64, 64, 32, warps=4, stages=1, rate=1.0)  # fp32: twice the memory, and not for speed
GROUPED_ROW_TILES = 8  # that follow each other on the same rows of the weight, which are then in the L2 cache


def tile_for(tokens: int, rows: int, sms: int, dtype: torch.dtype) -> GemmTile:
    """The tile with which the last of `sms` SMs ends first."""
    if dtype == torch.float32:
        return FP32_TILE

    def lasts(tile: GemmTile) -> float:
        turns = triton.cdiv(triton.cdiv(tokens, tile.rows) * triton.cdiv(rows, tile.columns), sms)
        return float(turns * tile.rows * tile.columns / tile.rate)

    return min(TILES, key=lasts)


@triton.jit
def _gemm_persistent(
    x_desc, weight_desc, bias_ptr, out_desc, T, N, IN,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    SWIGLU: tl.constexpr,
):  # fmt: skip
    """y = x weight^T + bias, or silu(gate) * up of it where rows of the weight alternate gate and up (see swiglu).

    The kernel is persistent, and tiles that follow each other share rows of x and of the weight in the L2 cache.
    Reference: Tillet et al., "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations",
    MAPL 2019; its tutorials "Matrix Multiplication" (grouped order) and "Persistent Matmul".
    """
    HALF: tl.constexpr = COLUMNS // 2
    row_tiles, column_tiles = tl.cdiv(T, ROWS), tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        group = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % (GROUP * column_tiles) % group) * ROWS
        column = tile % (GROUP * column_tiles) // group * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            acc = tl.dot(x_desc.load([row, start]), weight_desc.load([column, start]).T, acc, input_precision="ieee")
        if bias_ptr is not None:
            bias_column = column + tl.arange(0, COLUMNS)
            acc += tl.load(bias_ptr + bias_column, mask=bias_column < N, other=0.0)[None, :]
        if SWIGLU:
            out_desc.store([row, column // 2], swiglu(acc, ROWS, COLUMNS).to(out_desc.dtype))
        else:  # in halves: room for a whole tile would cost a stage
            left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
            out_desc.store([row, column], left.to(out_desc.dtype))
            out_desc.store([row, column + HALF], right.to(out_desc.dtype))


def gemm_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    swiglu: bool,
    out: Tensor,
    num_sms: int | None = None,
    tile: GemmTile | None = None,
) -> None:
    """Compute x weight^T + bias, or its silu(gate) * up with `swiglu`; linear and linear_swiglu check the operands.

    x [T, in], weight [N, in], bias [N] -> out [T, N], or [T, N / 2] with `swiglu`; of one floating dtype, and matrices
    have rows that begin at multiples of 16 bytes. `tile`: to measure others than the one of tile_for.

    Raises:
        ValueError: num_sms is not positive.
    """
    sms = min(num_sms or device_sms(x.device), device_sms(x.device))
    t = tile or tile_for(len(x), len(weight), sms, x.dtype)
    tiles = triton.cdiv(len(x), t.rows) * triton.cdiv(len(weight), t.columns)
    _gemm_persistent[(programs(tiles, num_sms, x.device, per_sm=1),)](
        TensorDescriptor.from_tensor(x, [t.rows, t.depth]),
        TensorDescriptor.from_tensor(weight, [t.columns, t.depth]),
        bias,
        TensorDescriptor.from_tensor(out, [t.rows, t.columns // 2]),
        len(x), len(weight), x.shape[1], t.rows, t.columns, t.depth, GROUPED_ROW_TILES, t.stages, swiglu,
        num_warps=t.warps,
    )  # fmt: skip
