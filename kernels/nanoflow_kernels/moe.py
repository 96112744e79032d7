"""Products of a mixture of experts, with rows grouped by expert; also of FP8 (e4m3) operands.

Shape legend: T tokens, E experts, k chosen experts a token, C = T k choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.gemm.persistent import Scales
from nanoflow_kernels.grid import programs
from nanoflow_kernels.swiglu import swiglu

LISTED_CHOICES = 1024  # that a program looks at at once
SUMMED_COLUMNS = 1024  # that a program sums at once
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH_BYTES, GROUPED_STAGES = 128, 256, 128, 3  # of the grouped product


@triton.jit
def _list_choices(experts_ptr, members_ptr, counts_ptr, C, experts_stride, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """members[e] = the choices c of expert e, ascending: experts[c // k, c % k] = e. Program e lists expert e's."""
    expert = tl.program_id(0)
    count = 0
    for begin in range(0, C, BLOCK):
        choice = begin + tl.arange(0, BLOCK)
        inside = choice < C
        chosen = tl.load(experts_ptr + choice // CHOSEN * experts_stride + choice % CHOSEN, mask=inside, other=-1)
        is_mine = (chosen == expert).to(tl.int32)
        tl.store(members_ptr + expert * C + count + tl.cumsum(is_mine) - 1, choice, mask=is_mine != 0)
        count += tl.sum(is_mine)
    tl.store(counts_ptr + expert, count)


@triton.jit
def _grouped(
    x_ptr, weight, x_scale_ptr, weight_scale_ptr, members_ptr, counts_ptr, scale_ptr, out_ptr, C, N, IN, E,
    x_stride, x_part_stride, x_scale_stride, x_scale_part_stride, scale_stride, out_stride, out_part_stride,
    CHOSEN: tl.constexpr, SWIGLU: tl.constexpr, EXPERTS: tl.constexpr, BULK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[c] = swiglu(weight[e] x[c]), or scale[c] weight[e] x[c], for every choice c, of an expert e.

    Choice c is part c % k of row c // k, of x (or the whole row, where x_part_stride is 0) and of out. N: rows of an
    expert's matrix. weight: with BULK the descriptor of tiles of the matrices, one below the other; else the pointer.
    With x_scale_ptr operands are e4m3, with a scale for each part of x and each row of the matrices.
    Reference: Gale et al., "MegaBlocks", MLSys 2023 (grouped products without padding to a capacity).
    """
    expert_id = tl.arange(0, EXPERTS)
    row_tiles = tl.cdiv(tl.load(counts_ptr + expert_id, mask=expert_id < E, other=0), ROWS)
    stop_tile = tl.cumsum(row_tiles)
    column_tiles = tl.cdiv(N, COLUMNS)
    for tile in range(tl.program_id(0), tl.sum(row_tiles) * column_tiles, tl.num_programs(0)):
        # Experts one after the other; within one, rows fastest: tiles that run together share the expert's matrix.
        expert = tl.sum((stop_tile * column_tiles <= tile).to(tl.int32))
        mine = tl.sum(tl.where(expert_id == expert, row_tiles, 0))
        before = tl.sum(tl.where(expert_id < expert, row_tiles, 0))
        within = tile - before * column_tiles
        row = within % mine * ROWS + tl.arange(0, ROWS)
        column = within // mine * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        is_real = row < tl.load(counts_ptr + expert)
        choice = tl.load(members_ptr + expert * C + row, mask=is_real, other=0).to(tl.int64)
        token, part = choice // CHOSEN, choice % CHOSEN
        a_ptr = x_ptr + token * x_stride + part * x_part_stride
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            inside = start + depth < IN
            a_tile = tl.load(
                a_ptr[:, None] + start + depth[None, :], mask=is_real[:, None] & inside[None, :], other=0.0
            )
            if BULK:  # columns beyond this expert's are the next one's: they are not stored
                b_tile = weight.load([expert * N + within // mine * COLUMNS, start]).T
            else:
                b_ptr = weight + (expert.to(tl.int64) * N + column)[None, :] * IN + start + depth[:, None]
                b_tile = tl.load(b_ptr, mask=(column < N)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        if x_scale_ptr is not None:
            of_x_ptr = x_scale_ptr + token * x_scale_stride + part * x_scale_part_stride
            of_x = tl.load(of_x_ptr, mask=is_real, other=0.0)
            of_weight = tl.load(weight_scale_ptr + expert * N + column, mask=column < N, other=0.0)
            acc = acc * of_x[:, None] * of_weight[None, :]
        o_ptr = out_ptr + (token * out_stride + part * out_part_stride)[:, None]
        if SWIGLU:
            half = within // mine * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            y = swiglu(acc, ROWS, COLUMNS).to(out_ptr.dtype.element_ty)
            tl.store(o_ptr + half[None, :], y, mask=is_real[:, None] & (half < N // 2)[None, :])
        else:
            y = acc * tl.load(scale_ptr + token * scale_stride + part, mask=is_real, other=0.0)[:, None]
            tl.store(
                o_ptr + column[None, :], y.to(out_ptr.dtype.element_ty), mask=is_real[:, None] & (column < N)[None, :]
            )


@triton.jit
def _sum_parts(parts_ptr, out_ptr, T, N, out_stride, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = parts[t, 0] + parts[t, 1] + .., of parts [T, CHOSEN, N], in that order and in fp32."""
    blocks = tl.cdiv(N, BLOCK)
    for item in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        row = tl.cast(item // blocks, tl.int64)
        column = item % blocks * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for choice in tl.static_range(CHOSEN):
            total += tl.load(parts_ptr + (row * CHOSEN + choice) * N + column, mask=column < N, other=0.0)
        tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=column < N)


def _grouped_product(
    x: Tensor,
    scales: Scales | None,
    experts: Tensor,
    weight: Tensor,
    weights: Tensor | None,
    out: Tensor,
    num_sms: int | None,
) -> None:
    """Launch _grouped: with SwiGLU, of whole rows of x, where the router's `weights` are None; else of their parts."""
    if not weight.is_contiguous():
        raise ValueError(f"grouped: weight: expected contiguous, got strides {weight.stride()}")
    (tokens, chosen), (count, width, inner) = experts.shape, weight.shape
    choices, swiglu = tokens * chosen, weights is None
    members = torch.empty(count, choices, dtype=torch.int32, device=x.device)
    counts = torch.empty(count, dtype=torch.int32, device=x.device)
    _list_choices[(count,)](experts, members, counts, choices, experts.stride(0), chosen, LISTED_CHOICES)
    bulk, depth = inner * weight.element_size() % 16 == 0, TILE_DEPTH_BYTES // min(2, x.element_size())
    matrix = TensorDescriptor.from_tensor(weight.view(-1, inner), [TILE_COLUMNS, depth]) if bulk else weight
    most = (choices // TILE_ROWS + count) * triton.cdiv(width, TILE_COLUMNS)
    x_scale, weight_scale = scales or (None, None)
    _grouped[(programs(most, num_sms, x.device, per_sm=1),)](
        x, matrix, x_scale, weight_scale, members, counts, weights, out, choices, width, inner, count,
        x.stride(0), 0 if swiglu else inner, 0 if x_scale is None else x_scale.stride(0), 0 if swiglu else 1,
        0 if weights is None else weights.stride(0), out.stride(0), width // 2 if swiglu else width,
        chosen, swiglu, triton.next_power_of_2(count), bulk,
        TILE_ROWS, TILE_COLUMNS, depth, 1 if x.dtype == torch.float32 else GROUPED_STAGES, num_warps=8,
    )  # fmt: skip


def grouped_linear_swiglu(
    x: Tensor, experts: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None
) -> None:
    """Compute linear_swiglu of each token with the matrices of its chosen experts, side by side in its row.

    x [T, in], experts [T, k] int32, weight [E, 2 F, in] contiguous -> [T, k F], of one floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    check_dtype("grouped_linear_swiglu", x.dtype, weight=weight, out=out)
    _linear_swiglu("grouped_linear_swiglu", x, None, experts, weight, out, num_sms)


def scaled_grouped_linear_swiglu(
    x: Tensor,
    x_scale: Tensor,
    experts: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out: Tensor,
    num_sms: int | None = None,
) -> None:
    """Compute scaled_linear_swiglu of each token with the matrices of its chosen experts, side by side in its row.

    x [T, in] e4m3, x_scale [T, 1] fp32, experts [T, k] int32, weight [E, 2 F, in] e4m3 contiguous, weight_scale
    [E, 2 F] fp32 contiguous -> [T, k F] of any floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    kernel = "scaled_grouped_linear_swiglu"
    scales = Scales(x_scale, weight_scale)
    _check_scales(kernel, x, scales, weight, 1)
    _linear_swiglu(kernel, x, scales, experts, weight, out, num_sms)


def _linear_swiglu(
    kernel: str, x: Tensor, scales: Scales | None, experts: Tensor, weight: Tensor, out: Tensor, num_sms: int | None
) -> None:
    check_rows(kernel, x=x, experts=experts, out=out)
    check_dtype(kernel, torch.int32, experts=experts)
    check_shape(kernel, "weight", weight, len(weight), 2 * out.shape[1] // experts.shape[1], x.shape[1])
    if len(x):
        _grouped_product(x, scales, experts, weight, None, out, num_sms)


def grouped_combine(
    x: Tensor, experts: Tensor, weights: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None
) -> None:
    """Compute the sum over a token's choices of its weight times (that part of the row times the expert's matrix).

    x [T, k in], experts [T, k] int32, weights [T, k] fp32, weight [E, out, in] contiguous -> [T, out], of one floating
    dtype but for experts and weights.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    check_dtype("grouped_combine", x.dtype, weight=weight, out=out)
    _combine("grouped_combine", x, None, experts, weights, weight, out, num_sms)


def scaled_grouped_combine(
    x: Tensor,
    x_scale: Tensor,
    experts: Tensor,
    weights: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out: Tensor,
    num_sms: int | None = None,
) -> None:
    """Compute grouped_combine of what operands and scales stand for.

    x [T, k in] e4m3, x_scale [T, k] fp32, experts [T, k] int32, weights [T, k] fp32, weight [E, out, in] e4m3
    contiguous, weight_scale [E, out] fp32 contiguous -> [T, out] of any floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    scales = Scales(x_scale, weight_scale)
    _check_scales("scaled_grouped_combine", x, scales, weight, experts.shape[1])
    _combine("scaled_grouped_combine", x, scales, experts, weights, weight, out, num_sms)


def _combine(
    kernel: str,
    x: Tensor,
    scales: Scales | None,
    experts: Tensor,
    weights: Tensor,
    weight: Tensor,
    out: Tensor,
    num_sms: int | None,
) -> None:
    (tokens, chosen), (_, width, inner) = experts.shape, weight.shape
    check_rows(kernel, x=x, experts=experts, weights=weights, out=out)
    check_dtype(kernel, torch.int32, experts=experts)
    check_dtype(kernel, torch.float32, weights=weights)
    check_shape(kernel, "x", x, tokens, chosen * inner)
    check_shape(kernel, "out", out, tokens, width)
    if tokens == 0:
        return
    parts = torch.empty(tokens, chosen * width, dtype=torch.float32, device=x.device)
    _grouped_product(x, scales, experts, weight, weights, parts, num_sms)
    blocks = tokens * triton.cdiv(width, SUMMED_COLUMNS)
    _sum_parts[(programs(blocks, num_sms, x.device, per_sm=8),)](
        parts, out, tokens, width, out.stride(0), chosen, SUMMED_COLUMNS
    )


def _check_scales(kernel: str, x: Tensor, scales: Scales, weight: Tensor, parts: int) -> None:
    check_dtype(kernel, torch.float8_e4m3fn, x=x, weight=weight)
    check_dtype(kernel, torch.float32, x_scale=scales.x, weight_scale=scales.weight)
    check_rows(kernel, x_scale=scales.x)
    check_shape(kernel, "x_scale", scales.x, len(x), parts)
    check_shape(kernel, "weight_scale", scales.weight, *weight.shape[:2])
    if not scales.weight.is_contiguous():
        raise ValueError(f"{kernel}: weight_scale: expected contiguous, got strides {scales.weight.stride()}")
