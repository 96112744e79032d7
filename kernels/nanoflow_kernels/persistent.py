"""Dense products on a grid that fits the granted SMs: x weight^T, or its SwiGLU where the weight's rows alternate.

SwiGLU is applied in the epilogue, so that gates and ups never reach memory: row 2 i of the weight is gate i and row
2 i + 1 up i, which then stand side by side in the registers of one thread.

Shape legend: T tokens, N rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.gate import gated
from nanoflow_kernels.grid import device_sms, programs


class Tile(NamedTuple):
    """What a program computes at a time, and how."""

    rows: int
    columns: int  # of x weight^T
    depth: int
    warps: int
    stages: int
    rate: float  # what it computes in the time that the first of TILES takes for 1


# On H200 the first takes 716 us for Llama-3-8B's 2048 tokens x gate_up with SwiGLU, cuBLAS 717 us without
# (benchmarks/results/kernels_h200.json); the others leave less of the SMs idle where its tiles do not fill the grid.
TILES = (
    Tile(128, 256, 64, warps=8, stages=3, rate=1.0),
    Tile(128, 128, 64, warps=8, stages=5, rate=0.93),
    Tile(64, 256, 64, warps=4, stages=4, rate=0.87),
)
WIDE = Tile(64, 64, 32, warps=4, stages=1, rate=1.0)  # fp32: twice the memory, and not for speed
ROW_TILES = 8  # that take turns with the same columns, which are then in the cache


def tile_for(tokens: int, rows: int, sms: int, dtype: torch.dtype) -> Tile:
    """The tile with which the last of `sms` ends first."""
    if dtype == torch.float32:
        return WIDE

    def lasts(tile: Tile) -> float:
        turns = triton.cdiv(triton.cdiv(tokens, tile.rows) * triton.cdiv(rows, tile.columns), sms)
        return float(turns * tile.rows * tile.columns / tile.rate)

    return min(TILES, key=lasts)


@triton.jit
def _persistent(
    x, weight, bias, out, T, N, IN,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = COLUMNS // 2
    row_tiles, column_tiles = tl.cdiv(T, ROWS), tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        group = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % (GROUP * column_tiles) % group) * ROWS
        column = tile % (GROUP * column_tiles) // group * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            acc = tl.dot(x.load([row, start]), weight.load([column, start]).T, acc, input_precision="ieee")
        if bias is not None:
            place = column + tl.arange(0, COLUMNS)
            acc += tl.load(bias + place, mask=place < N, other=0.0)[None, :]
        if GATED:
            out.store([row, column // 2], gated(acc, ROWS, COLUMNS).to(out.dtype))
        else:  # in halves: room for a whole tile would cost a stage
            left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
            out.store([row, column], left.to(out.dtype))
            out.store([row, column + HALF], right.to(out.dtype))


def persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool,
    out: Tensor,
    num_sms: int | None = None,
    tile: Tile | None = None,
) -> None:
    """Operands as in linear and linear_swiglu, whose rows begin at multiples of 16 bytes. `tile`: to measure others."""
    sms = min(num_sms or device_sms(x.device), device_sms(x.device))
    t = tile or tile_for(len(x), len(weight), sms, x.dtype)
    tiles = triton.cdiv(len(x), t.rows) * triton.cdiv(len(weight), t.columns)
    _persistent[(programs(tiles, num_sms, x.device, per_sm=1),)](
        TensorDescriptor.from_tensor(x, [t.rows, t.depth]),
        TensorDescriptor.from_tensor(weight, [t.columns, t.depth]),
        bias,
        TensorDescriptor.from_tensor(out, [t.rows, t.columns // 2]),
        len(x), len(weight), x.shape[1], t.rows, t.columns, t.depth, ROW_TILES, t.stages, gated, num_warps=t.warps,
    )  # fmt: skip
