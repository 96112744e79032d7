"""These kernels compute a mixture of experts: the router's choice, and products with rows grouped by expert.

Shape legend: T tokens, E experts, k chosen experts a token, C = T k choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.grid import programs
from nanoflow_kernels.swiglu import swiglu

ROUTE_ROWS = 16  # that a program routes at once
LISTED_CHOICES = 1024  # that a program looks at at once
SUMMED_COLUMNS = 1024  # that a program sums at once
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, GROUPED_STAGES = 128, 256, 64, 3  # of the grouped product


@triton.jit
def _route(
    logits_ptr, experts_ptr, weights_ptr, T, E, logits_stride, experts_stride, weights_stride,
    CHOSEN: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """experts[t] = the CHOSEN largest of p = softmax(logits[t]), best first; weights[t] = p[experts[t]], divided by
    their sum to RENORMALISE.

    Reference: Jiang et al., "Mixtral of Experts", 2024 (the same as softmax over the chosen logits).
    """
    expert = tl.arange(0, BLOCK)
    rank = tl.arange(0, RANKS)[None, :]
    for begin in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = row < T
        x = tl.load(
            logits_ptr + row[:, None] * logits_stride + expert[None, :],
            mask=inside[:, None] & (expert < E)[None, :], other=-float("inf"),
        ).to(tl.float32)  # fmt: skip
        p = tl.exp(x - tl.max(x, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        rest = tl.where((expert < E)[None, :], p, -1.0)
        ids, best = tl.zeros([ROWS, RANKS], tl.int32), tl.zeros([ROWS, RANKS], tl.float32)
        for choice in tl.static_range(CHOSEN):
            chosen = tl.argmax(rest, 1)
            ids = tl.where(rank == choice, chosen[:, None].to(tl.int32), ids)
            best = tl.where(rank == choice, tl.max(rest, 1)[:, None], best)
            rest = tl.where(expert[None, :] == chosen[:, None], -1.0, rest)
        if RENORMALISE:
            best = best / tl.sum(best, 1)[:, None]
        is_wanted = inside[:, None] & (rank < CHOSEN)
        tl.store(experts_ptr + row[:, None] * experts_stride + rank, ids, mask=is_wanted)
        tl.store(weights_ptr + row[:, None] * weights_stride + rank, best, mask=is_wanted)


def route(logits: Tensor, *, renormalise: bool = True, out: tuple[Tensor, Tensor], num_sms: int | None = None) -> None:
    """Choose the k experts with the largest softmax over all of them, best first (the lower id where equal). Their
    weights are that softmax, divided by its sum over the k where `renormalise`.

    logits [T, E] of any floating dtype -> experts [T, k] int32, weights [T, k] fp32; 1 <= k <= E.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    experts, weights = out
    tokens, count = logits.shape
    check_rows("route", logits=logits, experts=experts, weights=weights)
    check_dtype("route", torch.int32, experts=experts)
    check_dtype("route", torch.float32, weights=weights)
    check_shape("route", "weights", weights, *experts.shape)
    if not 1 <= experts.shape[1] <= count:
        raise ValueError(f"route: experts: expected 1 to {count} columns, got {experts.shape[1]}")
    if tokens == 0:
        return
    _route[(programs(triton.cdiv(tokens, ROUTE_ROWS), num_sms, logits.device, per_sm=8),)](
        logits, experts, weights, tokens, count, logits.stride(0), experts.stride(0), weights.stride(0),
        experts.shape[1], triton.next_power_of_2(experts.shape[1]), ROUTE_ROWS, triton.next_power_of_2(count),
        renormalise,
    )  # fmt: skip


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
    x_ptr, weight, members_ptr, counts_ptr, scale_ptr, out_ptr, C, N, IN, E,
    x_stride, x_part_stride, scale_stride, out_stride, out_part_stride,
    CHOSEN: tl.constexpr, SWIGLU: tl.constexpr, EXPERTS: tl.constexpr, BULK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[c] = swiglu(weight[e] x[c]), or scale[c] weight[e] x[c], for every choice c, of an expert e.

    Choice c is part c % k of row c // k, of x (or the whole row, where x_part_stride is 0) and of out. N: rows of an
    expert's matrix. weight: with BULK the descriptor of tiles of the matrices, one below the other; else the pointer.
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
    experts: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out: Tensor,
    x_part_stride: int,
    num_sms: int | None,
) -> None:
    """Launch _grouped: with SwiGLU where `scale` is None. x_part_stride: from a choice's part of a row of x to the
    next choice's; 0 where the choices of a token share its row.
    """
    if not weight.is_contiguous():
        raise ValueError(f"grouped: weight: expected contiguous, got strides {weight.stride()}")
    (tokens, chosen), (count, width, inner) = experts.shape, weight.shape
    choices, part = tokens * chosen, width // 2 if scale is None else width
    members = torch.empty(count, choices, dtype=torch.int32, device=x.device)
    counts = torch.empty(count, dtype=torch.int32, device=x.device)
    _list_choices[(count,)](experts, members, counts, choices, experts.stride(0), chosen, LISTED_CHOICES)
    bulk = inner * weight.element_size() % 16 == 0  # what bulk copies ask of a row
    matrix = TensorDescriptor.from_tensor(weight.view(-1, inner), [TILE_COLUMNS, TILE_DEPTH]) if bulk else weight
    most = (choices // TILE_ROWS + count) * triton.cdiv(width, TILE_COLUMNS)
    _grouped[(programs(most, num_sms, x.device, per_sm=1),)](
        x, matrix, members, counts, scale, out, choices, width, inner, count,
        x.stride(0), x_part_stride, 0 if scale is None else scale.stride(0), out.stride(0), part,
        chosen, scale is None, triton.next_power_of_2(count), bulk,
        TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, 1 if x.dtype == torch.float32 else GROUPED_STAGES, num_warps=8,
    )  # fmt: skip


def grouped_linear_swiglu(
    x: Tensor, experts: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None
) -> None:
    """Compute linear_swiglu of each token with the matrices of its chosen experts, side by side in its row.

    x [T, in], experts [T, k] int32, weight [E, 2 F, in] contiguous -> [T, k F], of one floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    check_rows("grouped_linear_swiglu", x=x, experts=experts, out=out)
    check_dtype("grouped_linear_swiglu", x.dtype, weight=weight, out=out)
    check_dtype("grouped_linear_swiglu", torch.int32, experts=experts)
    width = 2 * out.shape[1] // experts.shape[1]
    check_shape("grouped_linear_swiglu", "weight", weight, len(weight), width, x.shape[1])
    if len(x):
        _grouped_product(x, experts, weight, None, out, 0, num_sms)


def grouped_combine(
    x: Tensor, experts: Tensor, weights: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None
) -> None:
    """Compute the sum over a token's choices of its weight times (that part of the row times the expert's matrix).

    x [T, k in], experts [T, k] int32, weights [T, k] fp32, weight [E, out, in] contiguous -> [T, out], of one floating
    dtype but for experts and weights.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    (tokens, chosen), (_, width, inner) = experts.shape, weight.shape
    check_rows("grouped_combine", x=x, experts=experts, weights=weights, out=out)
    check_dtype("grouped_combine", x.dtype, weight=weight, out=out)
    check_dtype("grouped_combine", torch.int32, experts=experts)
    check_dtype("grouped_combine", torch.float32, weights=weights)
    check_shape("grouped_combine", "x", x, tokens, chosen * inner)
    check_shape("grouped_combine", "out", out, tokens, width)
    if tokens == 0:
        return
    parts = torch.empty(tokens, chosen * width, dtype=torch.float32, device=x.device)
    _grouped_product(x, experts, weight, weights, parts, inner, num_sms)
    blocks = tokens * triton.cdiv(width, SUMMED_COLUMNS)
    _sum_parts[(programs(blocks, num_sms, x.device, per_sm=8),)](
        parts, out, tokens, width, out.stride(0), chosen, SUMMED_COLUMNS
    )
