"""Products of a few tokens (small M), whose time is the reading of the weight.

The weight's rows are the rows of the tensor cores' tile, and the few tokens its columns. A program reads some rows of
the weight from end to end; launched with PDL (pdl.py) it begins to do so before the kernel before it has ended.

Shape legend: T tokens, N rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.gemm.persistent import Scales
from nanoflow_kernels.grid import programs
from nanoflow_kernels.pdl import launch_dependents, prefetch_l2, uses_pdl, wait_for_earlier
from nanoflow_kernels.swiglu import swiglu

SMALL_M = 16  # tokens, at most
WEIGHT_ROWS = 64  # of a tile


class WeightTiling(NamedTuple):
    """How programs read their rows of the weight."""

    depth_bytes: int  # of a row in a tile
    stages: int  # tiles on their way
    per_sm: int  # programs
    prefetched_bytes: int  # of each row of a program's first tile, brought into the L2 cache while earlier kernels end


# The fastest of 20 on H200 at Llama-3-8B's shapes: few rows leave each program more to read.
SHORT_WEIGHT, TALL_WEIGHT = WeightTiling(512, 4, 1, 2048), WeightTiling(256, 4, 3, 512)
TALL_ROWS = 16384  # a weight of more rows is tall


@triton.jit
def _gemm_small_m(
    x_ptr, weight_desc, weight_ptr, x_scale_ptr, weight_scale_ptr, out_ptr, T, N, IN,
    x_stride, weight_stride, x_scale_stride, out_stride,
    SWIGLU: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    PREFETCHED_BYTES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = x weight^T, or silu(gate) * up of it where rows of the weight alternate gate and up (see swiglu).

    weight_desc: the descriptor of tiles [ROWS, DEPTH] of the weight at weight_ptr. With x_scale_ptr the operands are of
    e4m3 and have a scale a row.
    """
    token, depth = tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    is_real = token < T
    if PDL and PREFETCHED_BYTES > 0:
        # Two threads a row: a program has as many threads as that.
        thread = tl.arange(0, 2 * ROWS)
        row = tl.minimum(tl.program_id(0) * ROWS + thread // 2, N - 1).to(tl.int64)
        half = PREFETCHED_BYTES // 2 // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
        prefetch_l2(weight_ptr + row * weight_stride + thread % 2 * half, PREFETCHED_BYTES // 2)
    wait_for_earlier(PDL)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            inside = is_real[None, :] & (start + depth < IN)[:, None]
            tokens = tl.load(x_ptr + token[None, :] * x_stride + start + depth[:, None], mask=inside, other=0.0)
            acc = tl.dot(weight_desc.load([tile * ROWS, start]), tokens, acc)
        launch_dependents(PDL)
        y = acc.T
        if x_scale_ptr is not None:
            scaled_row = tile * ROWS + tl.arange(0, ROWS)
            of_x = tl.load(x_scale_ptr + token * x_scale_stride, mask=is_real, other=0.0)
            of_weight = tl.load(weight_scale_ptr + scaled_row, mask=scaled_row < N, other=0.0)
            y = y * of_x[:, None] * of_weight[None, :]
        ROWS_PER_COLUMN: tl.constexpr = 2 if SWIGLU else 1  # rows of the weight
        column = tile * (ROWS // ROWS_PER_COLUMN) + tl.arange(0, ROWS // ROWS_PER_COLUMN)
        if SWIGLU:
            y = swiglu(y, TOKENS, ROWS)
        offset = token[:, None] * out_stride + column[None, :]
        mask = is_real[:, None] & (column < N // ROWS_PER_COLUMN)[None, :]
        tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


def is_small_m(x: Tensor, weight: Tensor) -> bool:
    """Whether `gemm_small_m` is made for x weight^T: x [T, in], weight [out, in], of a dtype of 1 or 2 bytes."""
    return len(x) <= SMALL_M and x.element_size() <= 2 and weight.stride(0) * weight.element_size() % 16 == 0


def gemm_small_m(
    x: Tensor,
    weight: Tensor,
    scales: Scales | None = None,
    *,
    swiglu: bool,
    out: Tensor,
    num_sms: int | None = None,
    tiling: WeightTiling | None = None,
) -> None:
    """Compute x weight^T, or its silu(gate) * up with `swiglu`; the callers in dense.py and scaled.py check operands.

    x [T, in], weight [N, in], both of one dtype of 2 bytes or, with `scales` (ROW_SCALES), of e4m3 -> out [T, N], or
    [T, N / 2] with `swiglu`. `tiling`: to measure others than those above.
    """
    tiling = tiling or (TALL_WEIGHT if len(weight) > TALL_ROWS else SHORT_WEIGHT)
    depth = tiling.depth_bytes // x.element_size()
    pdl = uses_pdl(len(x), x.device)
    x_scale, weight_scale = scales or (None, None)
    _gemm_small_m[(programs(triton.cdiv(len(weight), WEIGHT_ROWS), num_sms, x.device, per_sm=tiling.per_sm),)](
        x, TensorDescriptor.from_tensor(weight, [WEIGHT_ROWS, depth]), weight, x_scale, weight_scale, out,
        len(x), len(weight), x.shape[1], x.stride(0), weight.stride(0), 0 if x_scale is None else x_scale.stride(0),
        out.stride(0), swiglu, SMALL_M, WEIGHT_ROWS, depth, tiling.stages,
        min(tiling.prefetched_bytes, x.shape[1] * x.element_size() // 32 * 32), pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
