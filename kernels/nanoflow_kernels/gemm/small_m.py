"""Products of a few tokens (small M), whose time is the reading of the weight.

The weight's rows are the rows of the tensor cores' tile, and the few tokens its columns. A program reads some rows of
the weight, from end to end or a part of their columns; launched with PDL (pdl.py) it begins to do so before the kernel
before it has ended. Of parts of columns, the program that ends last adds up what all have found.

Shape legend: T tokens, N rows of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.arrivals import arrival_counters
from nanoflow_kernels.checks import are_bulk
from nanoflow_kernels.gemm.persistent import Scales
from nanoflow_kernels.grid import programs
from nanoflow_kernels.pdl import launch_dependents, prefetch_l2, uses_pdl, wait_for_earlier
from nanoflow_kernels.swiglu import swiglu

SMALL_M = 128  # tokens, at most
FEWEST_COLUMNS = 16  # of the tensor cores' tile
MOST_SUMS = 8192  # of a program of 4 warps: more do not fit into their registers


class WeightTiling(NamedTuple):
    """How programs read their part of the weight."""

    rows: int  # of a tile
    depth_bytes: int  # of a row in a tile
    stages: int  # tiles on their way
    splits: int  # programs that share a tile's rows, each with a part of the columns
    per_sm: int  # programs
    prefetched_bytes: int  # of each row of a program's first tile, brought into the L2 cache while earlier kernels end
    early: bool  # whether the next kernel may start before this one has read its weights


# The fastest of 23 on H200 at the shapes of Llama-3 8B and 70B, in bf16 and FP8 (benchmarks/results/
# kernels_small_m_h200.json). x is read by every tile of rows, which costs more than the weight's reading gains by finer
# tiles or more parts. How a weight is split does not depend on the tokens: a token's product is the same among 1 as
# among SMALL_M.
FEW_TOKENS = 32
TALL_ROWS = 16384  # a weight of more rows is tall
TALL = WeightTiling(64, 256, 4, 1, 3, 512, False)
WHOLE_FEW, WHOLE = WeightTiling(64, 512, 4, 1, 1, 2048, False), WeightTiling(64, 256, 4, 1, 1, 2048, True)
HALVES_FEW, HALVES = WeightTiling(64, 256, 6, 2, 1, 1024, False), WeightTiling(64, 256, 4, 2, 1, 1024, True)
HALVED_ROWS = 66 * 64  # a weight of no more tiles than half the SMs is read by two programs a tile ...
HALVED_BYTES = 8192  # ... if its rows are this long
ONE_WAVE_ROWS = 132 * 64  # more tiles than SMs leave most of the SMs idle during the second wave


def tiling_for(weight: Tensor, tokens: int) -> WeightTiling:
    """The tiling for a weight [N, in] and so many tokens."""
    few = tokens <= FEW_TOKENS
    if len(weight) > TALL_ROWS:
        return TALL
    if len(weight) <= HALVED_ROWS and weight.shape[1] * weight.element_size() >= HALVED_BYTES:
        return HALVES_FEW if few else HALVES
    return WHOLE_FEW if few else WHOLE


def most_tokens(weight: Tensor) -> int:
    """The tokens up to which a layer's kernels take less time with these tilings at a weight [N, in] than with the
    persistent kernel or the library, be it that they start early: alone, cuBLAS is faster at some shapes from 64 on.
    """
    if len(weight) <= ONE_WAVE_ROWS:
        return SMALL_M
    return FEW_TOKENS if len(weight) > TALL_ROWS else FEWEST_COLUMNS


@triton.jit
def _prefetch(
    weight_ptr, weight_stride, N, IN, span,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Bring the first BYTES of each row of this program's first item into the L2 cache."""
    A_ROW: tl.constexpr = THREADS // ROWS
    thread = tl.arange(0, A_ROW * ROWS)
    of_thread: tl.constexpr = BYTES // A_ROW // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    row = tl.minimum(tl.program_id(0) // SPLITS * ROWS + thread // A_ROW, N - 1).to(tl.int64)
    column = tl.minimum(tl.program_id(0) % SPLITS * span, IN - A_ROW * of_thread)
    prefetch_l2(weight_ptr + row * weight_stride + column + thread % A_ROW * of_thread, BYTES // A_ROW)


@triton.jit
def _gemm_small_m(
    x_desc, weight_desc, weight_ptr, x_scale_ptr, weight_scale_ptr, partials_ptr, arrivals_ptr, out_ptr, T, N, IN,
    span, weight_stride, x_scale_stride, out_stride,
    SWIGLU: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    SPLITS: tl.constexpr, PREFETCHED_BYTES: tl.constexpr, THREADS: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = x weight^T, or silu(gate) * up of it where rows of the weight alternate gate and up (see swiglu).

    An item of work is a tile of ROWS rows of the weight and `span` of its columns, SPLITS items a tile. What the items
    of a tile have found is added up in the order of the columns, whichever ends last.

    weight_desc: the descriptor of tiles [ROWS, DEPTH] of the weight at weight_ptr. With x_scale_ptr the operands are of
    e4m3 and have a scale a row.
    Reference: Osama et al., "Stream-K", PPoPP 2023 (its section on fixed splits).
    """
    if EARLY:
        launch_dependents(PDL)
    if PDL and PREFETCHED_BYTES > 0:
        _prefetch(weight_ptr, weight_stride, N, IN, span, SPLITS, ROWS, PREFETCHED_BYTES, THREADS)
    wait_for_earlier(PDL)
    token, row = tl.arange(0, TOKENS), tl.arange(0, ROWS)
    is_real = token < T
    for item in range(tl.program_id(0), tl.cdiv(N, ROWS) * SPLITS, tl.num_programs(0)):
        tile, first = item // SPLITS, item % SPLITS * span
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in tl.range(first, tl.minimum(first + span, IN), DEPTH, num_stages=STAGES):
            acc = tl.dot(weight_desc.load([tile * ROWS, start]), x_desc.load([0, start]).T, acc)
        if not EARLY:
            launch_dependents(PDL)
        is_last = True
        if SPLITS > 1:
            place = row[:, None] * TOKENS + token[None, :]
            tl.store(partials_ptr + item * (ROWS * TOKENS) + place, acc, mask=is_real[None, :])
            tl.debug_barrier()  # all threads have stored before one says so
            is_last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            if SPLITS > 1:
                tl.store(arrivals_ptr + tile, 0)  # for the next product
                acc = tl.zeros([ROWS, TOKENS], tl.float32)
                for split in range(SPLITS):
                    part_ptr = partials_ptr + (tile * SPLITS + split) * (ROWS * TOKENS)
                    acc += tl.load(part_ptr + place, mask=is_real[None, :], other=0.0, cache_modifier=".cg")
            y = acc.T
            if x_scale_ptr is not None:
                scaled_row = tile * ROWS + row
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
    return len(x) <= most_tokens(weight) and x.element_size() <= 2 and are_bulk(x, weight)


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
    t = tiling or tiling_for(weight, len(x))
    tokens = max(FEWEST_COLUMNS, triton.next_power_of_2(len(x)))
    depth, tiles = t.depth_bytes // x.element_size(), triton.cdiv(len(weight), t.rows)
    span = triton.cdiv(triton.cdiv(x.shape[1], depth), t.splits) * depth
    warps, pdl = 4 if t.rows * tokens <= MOST_SUMS else 8, uses_pdl(len(x), x.device)
    x_scale, weight_scale = scales or (None, None)
    partials, arrivals = None, None
    if t.splits > 1:
        partials = x.new_empty(tiles * t.splits * t.rows * tokens, dtype=torch.float32)
        arrivals = arrival_counters(tiles, x.device)
    prefetched = min(t.prefetched_bytes, x.shape[1] * x.element_size() // 32 * 32)
    _gemm_small_m[(programs(tiles * t.splits, num_sms, x.device, per_sm=t.per_sm),)](
        TensorDescriptor.from_tensor(x, [tokens, depth]), TensorDescriptor.from_tensor(weight, [t.rows, depth]),
        weight, x_scale, weight_scale, partials, arrivals, out, len(x), len(weight), x.shape[1], span,
        weight.stride(0), 0 if x_scale is None else x_scale.stride(0), out.stride(0),
        swiglu, tokens, t.rows, depth, t.stages, t.splits, prefetched, 32 * warps, t.early, pdl,
        num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
