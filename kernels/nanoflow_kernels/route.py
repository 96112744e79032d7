"""The router of a mixture of experts: which of them a token goes to, and with what weights.

Shape legend: T tokens, E experts, k chosen experts a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.grid import programs

ROUTE_ROWS = 16  # that a program routes at once


@triton.jit
def _route(
    logits_ptr, experts_ptr, weights_ptr, T, E, logits_stride, experts_stride, weights_stride,
    CHOSEN: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """experts[t] = the CHOSEN largest of p = softmax(logits[t]), best first; weights[t] = p[experts[t]] / their sum.

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
        is_wanted = inside[:, None] & (rank < CHOSEN)
        tl.store(experts_ptr + row[:, None] * experts_stride + rank, ids, mask=is_wanted)
        tl.store(weights_ptr + row[:, None] * weights_stride + rank, best / tl.sum(best, 1)[:, None], mask=is_wanted)


def route(logits: Tensor, *, out: tuple[Tensor, Tensor], num_sms: int | None = None) -> None:
    """Choose the k experts with the largest softmax over all of them, best first (the lower id where equal), and their
    weights, which sum to 1.

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
    )  # fmt: skip
