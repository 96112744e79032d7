"""Mixture of experts: the router's choice, and products of rows grouped by expert on the device.

Shape legend: T tokens, E experts, k chosen experts a token, C = T k choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.gate import gated
from nanoflow_kernels.grid import programs
from nanoflow_kernels.operands import check_dtype, check_rows, check_shape

ROUTE_ROWS = 16
LIST_BLOCK = 1024
TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, STAGES = 128, 256, 64, 3


@triton.jit
def _route(
    logits, experts, weights, T, E, logits_stride, experts_stride, weights_stride,
    CHOSEN: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, BLOCK)
    slot = tl.arange(0, SLOTS)[None, :]
    for begin in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        row = begin + tl.arange(0, ROWS).to(tl.int64)
        inside = row < T
        x = tl.load(
            logits + row[:, None] * logits_stride + expert[None, :],
            mask=inside[:, None] & (expert < E)[None, :], other=-float("inf"),
        ).to(tl.float32)  # fmt: skip
        p = tl.exp(x - tl.max(x, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        rest = tl.where((expert < E)[None, :], p, -1.0)
        ids, best = tl.zeros([ROWS, SLOTS], tl.int32), tl.zeros([ROWS, SLOTS], tl.float32)
        for choice in tl.static_range(CHOSEN):
            chosen = tl.argmax(rest, 1)
            ids = tl.where(slot == choice, chosen[:, None].to(tl.int32), ids)
            best = tl.where(slot == choice, tl.max(rest, 1)[:, None], best)
            rest = tl.where(expert[None, :] == chosen[:, None], -1.0, rest)
        wanted = inside[:, None] & (slot < CHOSEN)
        tl.store(experts + row[:, None] * experts_stride + slot, ids, mask=wanted)
        tl.store(weights + row[:, None] * weights_stride + slot, best / tl.sum(best, 1)[:, None], mask=wanted)


def route(logits: Tensor, *, out: tuple[Tensor, Tensor], num_sms: int | None = None) -> None:
    """The k experts with the largest softmax over all of them, best first (the lower id where equal), and their
    weights, which sum to 1.

    logits [T, E] -> experts [T, k] int32, weights [T, k] fp32.
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
    )  # fmt: skip


@triton.jit
def _list_choices(experts, members, counts, C, experts_stride, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """Program e lists the choices (token k + number) of expert e, in order."""
    expert = tl.program_id(0)
    count = 0
    for begin in range(0, C, BLOCK):
        choice = begin + tl.arange(0, BLOCK)
        inside = choice < C
        chosen = tl.load(experts + choice // CHOSEN * experts_stride + choice % CHOSEN, mask=inside, other=-1)
        mine = (chosen == expert).to(tl.int32)
        tl.store(members + expert * C + count + tl.cumsum(mine) - 1, choice, mask=mine != 0)
        count += tl.sum(mine)
    tl.store(counts + expert, count)


@triton.jit
def _grouped(
    x, weight, members, counts, scale, out, C, N, IN, E, x_stride, x_part, scale_stride, out_stride, out_part,
    CHOSEN: tl.constexpr, GATED: tl.constexpr, EXPERTS: tl.constexpr, TILED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[choice] = gated(weight[expert] x[choice]), or scale[choice] times the product; choice c is part c % k of row
    c // k, of x and of out. N: rows of an expert's matrix."""
    expert_id = tl.arange(0, EXPERTS)
    row_tiles = tl.cdiv(tl.load(counts + expert_id, mask=expert_id < E, other=0), ROWS)
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
        real = row < tl.load(counts + expert)
        choice = tl.load(members + expert * C + row, mask=real, other=0).to(tl.int64)
        token, part = choice // CHOSEN, choice % CHOSEN
        a = x + token * x_stride + part * x_part
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            inside = start + depth < IN
            a_tile = tl.load(a[:, None] + start + depth[None, :], mask=real[:, None] & inside[None, :], other=0.0)
            if TILED:  # columns beyond this expert's are the next one's: they are not stored
                b_tile = weight.load([expert * N + within // mine * COLUMNS, start]).T
            else:
                b = weight + (expert.to(tl.int64) * N + column)[None, :] * IN + start + depth[:, None]
                b_tile = tl.load(b, mask=(column < N)[None, :] & inside[:, None], other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision="ieee")
        o = out + (token * out_stride + part * out_part)[:, None]
        if GATED:
            half = within // mine * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
            y = gated(acc, ROWS, COLUMNS).to(out.dtype.element_ty)
            tl.store(o + half[None, :], y, mask=real[:, None] & (half < N // 2)[None, :])
        else:
            y = acc * tl.load(scale + token * scale_stride + part, mask=real, other=0.0)[:, None]
            tl.store(o + column[None, :], y.to(out.dtype.element_ty), mask=real[:, None] & (column < N)[None, :])


@triton.jit
def _sum_parts(parts, out, T, N, out_stride, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = sum of parts [T, CHOSEN, N] over CHOSEN, in order."""
    blocks = tl.cdiv(N, BLOCK)
    for item in range(tl.program_id(0), T * blocks, tl.num_programs(0)):
        row = tl.cast(item // blocks, tl.int64)
        column = item % blocks * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for choice in tl.static_range(CHOSEN):
            total += tl.load(parts + (row * CHOSEN + choice) * N + column, mask=column < N, other=0.0)
        tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask=column < N)


def _grouped_product(
    x: Tensor, experts: Tensor, weight: Tensor, scale: Tensor | None, out: Tensor, x_part: int, num_sms: int | None
) -> None:
    if not weight.is_contiguous():
        raise ValueError(f"grouped: weight: expected contiguous, got strides {weight.stride()}")
    """Gated where there is no scale."""
    (tokens, chosen), (count, width, inner) = experts.shape, weight.shape
    choices, part = tokens * chosen, width // 2 if scale is None else width
    members = torch.empty(count, choices, dtype=torch.int32, device=x.device)
    counts = torch.empty(count, dtype=torch.int32, device=x.device)
    _list_choices[(count,)](experts, members, counts, choices, experts.stride(0), chosen, LIST_BLOCK)
    tiled = inner * weight.element_size() % 16 == 0  # what bulk copies ask of a row
    matrix = TensorDescriptor.from_tensor(weight.view(-1, inner), [TILE_COLUMNS, TILE_DEPTH]) if tiled else weight
    most = (choices // TILE_ROWS + count) * triton.cdiv(width, TILE_COLUMNS)
    _grouped[(programs(most, num_sms, x.device, per_sm=1),)](
        x, matrix, members, counts, scale, out, choices, width, inner, count,
        x.stride(0), x_part, 0 if scale is None else scale.stride(0), out.stride(0), part,
        chosen, scale is None, triton.next_power_of_2(count), tiled,
        TILE_ROWS, TILE_COLUMNS, TILE_DEPTH, 1 if x.dtype == torch.float32 else STAGES, num_warps=8,
    )  # fmt: skip


def grouped_linear_swiglu(
    x: Tensor, experts: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None
) -> None:
    """linear_swiglu of each token with the matrices of its chosen experts, side by side in its row.

    x [T, in], experts [T, k] int32, weight [E, 2 F, in] -> [T, k F], of one floating dtype.
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
    """The sum over a token's choices of its weight times (that part of the row times the expert's matrix).

    x [T, k in], experts [T, k] int32, weights [T, k] fp32, weight [E, out, in] -> [T, out], of one floating dtype.
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
    blocks = tokens * triton.cdiv(width, 1024)
    _sum_parts[(programs(blocks, num_sms, x.device, per_sm=8),)](parts, out, tokens, width, out.stride(0), chosen, 1024)
