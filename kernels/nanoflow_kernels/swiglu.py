"""SwiGLU in the epilogue of its product: silu(x gate^T) * (x up^T), whose gates and ups never reach memory.

A weight's rows alternate gate, up, gate, up: both stand side by side in the registers of one thread.

Shape legend: T tokens, F columns of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.few_tokens import few_tokens, is_few
from nanoflow_kernels.gate import gated
from nanoflow_kernels.grid import programs
from nanoflow_kernels.operands import check_bulk, check_dtype, check_rows, check_shape


class Tile(NamedTuple):
    """What a program computes at a time, and how."""

    rows: int
    columns: int  # of gates and ups
    depth: int
    warps: int
    stages: int
    per_sm: int = 1  # programs


# The fastest of ten on H200 at Llama-3-8B's size, up to 2048 tokens; at 2048 they take 716 us with SwiGLU, cuBLAS
# 717 us without (benchmarks/results/kernels_h200.json).
TALL = Tile(128, 256, 64, warps=8, stages=3)
SHORT = Tile(64, 256, 64, warps=4, stages=4)
WIDE = Tile(64, 64, 32, warps=4, stages=1)  # fp32: twice the memory, and not for speed
SHORT_TOKENS = 448  # up to here SHORT is faster where half of the last TALL tile would be empty
ROW_TILES = 8  # that take turns with the same columns, which are then in the cache


def tile_for(tokens: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:
        return WIDE
    return SHORT if tokens <= SHORT_TOKENS and triton.cdiv(tokens, SHORT.rows) % 2 else TALL


@triton.jit
def _linear_swiglu(
    x, weight, out, T, COLUMNS_ALL, IN,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(T, ROWS), tl.cdiv(COLUMNS_ALL, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * column_tiles) * GROUP
        group = tl.minimum(row_tiles - first, GROUP)
        row = (first + tile % (GROUP * column_tiles) % group) * ROWS
        column = tile % (GROUP * column_tiles) // group * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            acc = tl.dot(x.load([row, start]), weight.load([column, start]).T, acc, input_precision="ieee")
        out.store([row, column // 2], gated(acc, ROWS, COLUMNS).to(out.dtype))


def linear_swiglu(
    x: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None, tile: Tile | None = None
) -> None:
    """silu(x gate^T) * (x up^T), where row 2 i of the weight is gate i and row 2 i + 1 is up i.

    x [T, in], weight [2 F, in] -> [T, F], of one floating dtype, whose rows begin at multiples of 16 bytes. `tile`:
    to measure others.
    """
    check_rows("linear_swiglu", x=x, weight=weight, out=out)
    check_dtype("linear_swiglu", x.dtype, weight=weight, out=out)
    check_shape("linear_swiglu", "weight", weight, 2 * out.shape[1], x.shape[1])
    check_shape("linear_swiglu", "out", out, len(x), out.shape[1])
    check_bulk("linear_swiglu", x=x, weight=weight, out=out)
    if len(x) == 0:
        return
    if tile is None and is_few(x, weight):
        few_tokens(x, weight, gated=True, out=out, num_sms=num_sms)
        return
    t = tile or tile_for(len(x), x.dtype)
    tiles = triton.cdiv(len(x), t.rows) * triton.cdiv(len(weight), t.columns)
    _linear_swiglu[(programs(tiles, num_sms, x.device, per_sm=t.per_sm),)](
        TensorDescriptor.from_tensor(x, [t.rows, t.depth]),
        TensorDescriptor.from_tensor(weight, [t.columns, t.depth]),
        TensorDescriptor.from_tensor(out, [t.rows, t.columns // 2]),
        len(x), len(weight), x.shape[1], t.rows, t.columns, t.depth, ROW_TILES, t.stages, num_warps=t.warps,
    )  # fmt: skip
