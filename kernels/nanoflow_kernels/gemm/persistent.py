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
from nanoflow_kernels.pdl import launch_dependents, uses_pdl, wait_for_earlier
from nanoflow_kernels.swiglu import gated, swiglu

SCALED_BLOCK = 128  # columns of x, and rows and columns of the weight, that share a scale of kind BLOCK_SCALES
NO_SCALES, ROW_SCALES, BLOCK_SCALES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Scales(NamedTuple):
    """What e4m3 operands are to be multiplied by, fp32."""

    x: Tensor  # [T, 1], or [T, in / 128]
    weight: Tensor  # [N], or [ceil(N / 128), ceil(in / 128)]

    @property
    def kind(self) -> int:
        """ROW_SCALES or BLOCK_SCALES."""
        return int((ROW_SCALES if self.weight.ndim == 1 else BLOCK_SCALES).value)


class GemmTile(NamedTuple):
    """What a program computes at a time, and how."""

    rows: int  # of x
    columns: int  # of x weight^T
    depth: int  # columns of x and weight that are read at a time
    warps: int
    stages: int  # reads on their way
    rate: float  # results a time, where those of the first of TILES are 1


# On H200 the first takes 716 us for Llama-3-8B's 2048 tokens x gate_up with SwiGLU, cuBLAS 717 us without
# (benchmarks/results/kernels_h200.json); in FP8 391 us, cuBLAS without fast accumulation 418 us
# (kernels_fp8_h200.json). The others leave less of the SMs idle where its tiles do not fill the grid.
TILES = (
    GemmTile(128, 256, 64, warps=8, stages=3, rate=1.0),
    GemmTile(128, 128, 64, warps=8, stages=5, rate=0.93),
    GemmTile(64, 256, 64, warps=4, stages=4, rate=0.87),
)
FP8_TILES = (
    GemmTile(128, 256, 128, warps=8, stages=4, rate=1.0),
    GemmTile(128, 128, 128, warps=8, stages=5, rate=0.93),
    GemmTile(64, 256, 128, warps=4, stages=4, rate=0.87),
)
# A product is summed beside the sum of those before, which takes twice the registers.
BLOCK_TILE = GemmTile(64, 2 * SCALED_BLOCK, SCALED_BLOCK, warps=8, stages=4, rate=1.0)
FP32_TILE = GemmTile(64, 64, 32, warps=4, stages=1, rate=1.0)  # fp32: twice the memory, and not for speed
GROUPED_ROW_TILES = 8  # that follow each other on the same rows of the weight, which are then in the L2 cache


def tile_for(tokens: int, rows: int, sms: int, dtype: torch.dtype, kind: int) -> GemmTile:
    """The tile with which the last of `sms` SMs ends first, for operands of `dtype` with scales of this kind."""
    if kind == BLOCK_SCALES:
        return BLOCK_TILE
    if dtype == torch.float32:
        return FP32_TILE

    def lasts(tile: GemmTile) -> float:
        turns = triton.cdiv(triton.cdiv(tokens, tile.rows) * triton.cdiv(rows, tile.columns), sms)
        return float(turns * tile.rows * tile.columns / tile.rate)

    return min(TILES if dtype.itemsize == 2 else FP8_TILES, key=lasts)


@triton.jit
def _gemm_persistent(
    x_desc, weight_desc, bias_ptr, x_scale_ptr, weight_scale_ptr, out_desc, T, N, IN,
    x_scale_stride, weight_scale_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    SWIGLU: tl.constexpr, SCALES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x weight^T + bias, or silu(gate) * up of it where rows of the weight alternate gate and up (see swiglu).

    SCALES: NO_SCALES; ROW_SCALES, of the rows of x and weight; or BLOCK_SCALES, of each DEPTH columns of x and
    DEPTH x DEPTH block of the weight, whose gates and ups alternate in runs of DEPTH = COLUMNS / 2 rows.

    The kernel is persistent, and tiles that follow each other share rows of x and of the weight in the L2 cache.
    Reference: Tillet et al., "Triton: An Intermediate Language and Compiler for Tiled Neural Network Computations",
    MAPL 2019; its tutorials "Matrix Multiplication" (grouped order) and "Persistent Matmul".
    """
    wait_for_earlier(PDL)
    HALF: tl.constexpr = COLUMNS // 2
    row_tiles, column_tiles = tl.cdiv(T, ROWS), tl.cdiv(N, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        group = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % (GROUP * column_tiles) % group) * ROWS
        column = tile % (GROUP * column_tiles) // group * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        if SCALES != NO_SCALES:
            x_row, weight_row = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
            of_x_ptr = x_scale_ptr + x_row * x_scale_stride
            rows_of_scale: tl.constexpr = DEPTH if SCALES == BLOCK_SCALES else 1
            of_weight_ptr = weight_scale_ptr + weight_row // rows_of_scale * weight_scale_stride
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            x_tile, weight_tile = x_desc.load([row, start]), weight_desc.load([column, start]).T
            if SCALES == BLOCK_SCALES:
                of_x = tl.load(of_x_ptr + start // DEPTH, mask=x_row < T, other=0.0)
                of_weight = tl.load(of_weight_ptr + start // DEPTH, mask=weight_row < N, other=0.0)
                acc += tl.dot(x_tile, weight_tile) * of_x[:, None] * of_weight[None, :]
            else:
                acc = tl.dot(x_tile, weight_tile, acc, input_precision="ieee")
        if SCALES == ROW_SCALES:
            of_x = tl.load(of_x_ptr, mask=x_row < T, other=0.0)
            of_weight = tl.load(of_weight_ptr, mask=weight_row < N, other=0.0)
            acc = acc * of_x[:, None] * of_weight[None, :]
        if bias_ptr is not None:
            bias_column = column + tl.arange(0, COLUMNS)
            acc += tl.load(bias_ptr + bias_column, mask=bias_column < N, other=0.0)[None, :]
        if SWIGLU and SCALES != BLOCK_SCALES:
            out_desc.store([row, column // 2], swiglu(acc, ROWS, COLUMNS).to(out_desc.dtype))
        else:  # in halves: room for a whole tile would cost a stage
            left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
            if SWIGLU:
                out_desc.store([row, column // 2], gated(left, right).to(out_desc.dtype))
            else:
                out_desc.store([row, column], left.to(out_desc.dtype))
                out_desc.store([row, column + HALF], right.to(out_desc.dtype))
    launch_dependents(PDL)


def gemm_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scales: Scales | None = None,
    *,
    swiglu: bool,
    out: Tensor,
    num_sms: int | None = None,
    tile: GemmTile | None = None,
) -> None:
    """Compute x weight^T + bias, or its silu(gate) * up with `swiglu`; the callers in dense.py and scaled.py check the
    operands.

    x [T, in], weight [N, in], both of one floating dtype or, with `scales`, of e4m3; bias [N] -> out [T, N], or
    [T, N / 2] with `swiglu`. Matrices have rows that begin at multiples of 16 bytes. `tile`: to measure others than the
    one of tile_for.

    Raises:
        ValueError: num_sms is not positive.
    """
    sms = min(num_sms or device_sms(x.device), device_sms(x.device))
    kind = NO_SCALES.value if scales is None else scales.kind
    t = tile or tile_for(len(x), len(weight), sms, x.dtype, kind)
    tiles = triton.cdiv(len(x), t.rows) * triton.cdiv(len(weight), t.columns)
    # Stages and results share the SM's memory: of FP8, wide results leave room for one stage fewer.
    stages = t.stages - 1 if scales is not None and out.dtype == torch.float32 else t.stages
    x_scale, weight_scale = scales or (None, None)
    pdl = uses_pdl(len(x), x.device)
    _gemm_persistent[(programs(tiles, num_sms, x.device, per_sm=1),)](
        TensorDescriptor.from_tensor(x, [t.rows, t.depth]),
        TensorDescriptor.from_tensor(weight, [t.columns, t.depth]),
        bias, x_scale, weight_scale,
        TensorDescriptor.from_tensor(out, [t.rows, t.columns // 2]),
        len(x), len(weight), x.shape[1],
        *((0, 0) if scales is None else (scales.x.stride(0), scales.weight.stride(0))),
        t.rows, t.columns, t.depth, GROUPED_ROW_TILES, stages, swiglu, kind, pdl, num_warps=t.warps, launch_pdl=pdl,
    )  # fmt: skip
