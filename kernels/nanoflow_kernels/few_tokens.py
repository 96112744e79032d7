"""Products of a few tokens, bound by the reading of the weight: its rows fill the wide side of the tensor cores' tile.

Shape legend: T tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoflow_kernels.chain import await_earlier, is_chained, prefetch, release_next
from nanoflow_kernels.gate import gated
from nanoflow_kernels.grid import programs

TOKENS = 16  # at most
ROWS = 64  # of a tile of the weight


class Plan(NamedTuple):
    """How programs read their rows."""

    depth: int  # of a tile
    stages: int
    per_sm: int  # programs
    ahead: int  # bytes of each row of its first tile that a program brings into the cache while earlier kernels end


# The fastest of 20 on H200 at Llama-3-8B's shapes: few rows leave each program more to read.
FEW_ROWS, MANY_ROWS = Plan(256, 4, 1, 2048), Plan(128, 4, 3, 512)
MANY = 16384


@triton.jit
def _few_tokens(
    x, weight, weight_rows, out, T, N, IN, x_stride, weight_stride, out_stride,
    GATED: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    token, depth = tl.arange(0, TOKENS), tl.arange(0, DEPTH)
    real = token < T
    if CHAINED and AHEAD > 0:
        # Two lanes a row: there are as many as threads.
        lane = tl.arange(0, 2 * ROWS)
        row = tl.minimum(tl.program_id(0) * ROWS + lane // 2, N - 1).to(tl.int64)
        prefetch(weight_rows + row * weight_stride + lane % 2 * (AHEAD // 4), AHEAD // 2)
    await_earlier(CHAINED)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for start in tl.range(0, IN, DEPTH, num_stages=STAGES):
            inside = real[None, :] & (start + depth < IN)[:, None]
            tokens = tl.load(x + token[None, :] * x_stride + start + depth[:, None], mask=inside, other=0.0)
            acc = tl.dot(weight.load([tile * ROWS, start]), tokens, acc)
        release_next(CHAINED)
        y = acc.T
        PER_COLUMN: tl.constexpr = 2 if GATED else 1  # rows of the weight
        column = tile * (ROWS // PER_COLUMN) + tl.arange(0, ROWS // PER_COLUMN)
        if GATED:
            y = gated(y, TOKENS, ROWS)
        place = token[:, None] * out_stride + column[None, :]
        mask = real[:, None] & (column < N // PER_COLUMN)[None, :]
        tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


def is_few(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_tokens` is made for this product."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return narrow and len(x) <= TOKENS and weight.stride(0) * weight.element_size() % 16 == 0


def few_tokens(x: Tensor, weight: Tensor, *, gated: bool, out: Tensor, num_sms: int | None = None) -> None:
    """x weight^T, or its silu(gate) * up where rows of the weight alternate; operands as in linear, linear_swiglu."""
    plan = MANY_ROWS if len(weight) > MANY else FEW_ROWS
    chained = is_chained(len(x), x.device)
    _few_tokens[(programs(triton.cdiv(len(weight), ROWS), num_sms, x.device, per_sm=plan.per_sm),)](
        x, TensorDescriptor.from_tensor(weight, [ROWS, plan.depth]), weight, out, len(x), len(weight), x.shape[1],
        x.stride(0), weight.stride(0), out.stride(0), gated, TOKENS, ROWS, plan.depth, plan.stages,
        min(plan.ahead, x.shape[1] * 2 // 32 * 32), chained, num_warps=4, launch_pdl=chained,
    )  # fmt: skip
