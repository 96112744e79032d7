"""Sampling on the device, without a word from the host: what reference_sampling says, in a few passes over a row.

All restrictions keep the ids above a threshold of the logit, and of those at it the lowest few. Thresholds are found
three bits at a time, from the top: how many ids, or how much of their mass, is at or above each of seven candidates.

Shape legend: R rows, V vocabulary, P of the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.operands import check_dtype, check_rows
from nanoflow_kernels.reference_sampling import IN_PROMPT, logprobs

__all__ = ["greedy", "logprobs", "mask", "penalise", "sample"]

BLOCK = 8192  # ids a program looks at at once
LANES = 2048  # the same, where it compares each with seven candidates
WARPS = 16
STAGES = tl.constexpr(3)  # blocks on their way
PROMPT_BIT = tl.constexpr(IN_PROMPT)


@triton.jit
def _order(x):
    """fp32 to uint32, so that the order is kept, and the zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _threshold(row, V, peak, temperature, floor, wanted, BY_MASS: tl.constexpr, LANES: tl.constexpr):
    """A highest order t at which the ids of order >= t are `wanted`, or have that mass; only ids >= floor count."""
    digit = tl.arange(0, 8)
    threshold = tl.zeros([], tl.uint32)
    group = 0
    while group < 11:
        shift = 30 - 3 * group
        candidate = threshold | (digit.to(tl.uint32) << shift)
        real = (digit > 0) & ((group > 0) | (digit < 4))  # of the first group two bits are left
        amounts = tl.zeros([8, LANES], tl.float32)
        for begin in tl.range(0, V, LANES, num_stages=STAGES):
            id = begin + tl.arange(0, LANES)
            x = tl.load(row + id, mask=id < V, other=-float("inf"))
            order = _order(x)
            amount = tl.exp((x - peak) / temperature) if BY_MASS else tl.full([LANES], 1.0, tl.float32)
            amount = tl.where((id < V) & (order >= floor), amount, 0.0)
            amounts += tl.where(order[None, :] >= candidate[:, None], amount[None, :], 0.0)
        at_least = tl.sum(amounts, 1).to(tl.float64)
        enough = real & (at_least >= wanted)
        threshold = tl.max(tl.where(enough, candidate, threshold))
        # Exactly as many: lower bits would only name the lowest of them.
        exact = tl.min(tl.where(enough, at_least, float("inf"))) == wanted
        group = tl.where(exact, 11, group + 1)
    return threshold


@triton.jit
def _amounts(row, V, peak, temperature, threshold, BLOCK: tl.constexpr):
    """Count and mass of the ids of order > threshold."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for begin in tl.range(0, V, BLOCK, num_stages=STAGES):
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row + id, mask=id < V, other=-float("inf"))
        above = (id < V) & (_order(x) > threshold)
        count += tl.sum(above.to(tl.int32))
        mass += tl.sum(tl.where(above, tl.exp((x - peak) / temperature), 0.0)).to(tl.float64)
    return count, mass


@triton.jit
def _kept(x, id, V, peak, temperature, threshold, ties, seen):
    """Weights of a block's ids, 0 for those excluded, and how many at the threshold were seen up to its end."""
    order = _order(x)
    tie = ((order == threshold) & (id < V)).to(tl.int32)
    keep = (order > threshold) | ((tie != 0) & (seen + tl.cumsum(tie) <= ties))
    return tl.where(keep & (id < V), tl.exp((x - peak) / temperature), 0.0), seen + tl.sum(tie)


@triton.jit
def _sample(
    logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, ids, V, logits_stride,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = logits + program.to(tl.int64) * logits_stride
    peak = -float("inf")
    best = 0
    for begin in tl.range(0, V, BLOCK, num_stages=STAGES):
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row + id, mask=id < V, other=-float("inf"))
        highest = tl.max(x)
        best = tl.where(highest > peak, begin + tl.argmax(x, 0), best)
        peak = tl.maximum(highest, peak)
    temperature = tl.load(temperatures + program).to(tl.float32)
    if temperature > 0:
        top_k, top_p = tl.load(top_ks + program), tl.load(top_ps + program).to(tl.float64)
        threshold = tl.zeros([], tl.uint32)
        ties = V
        if (top_k > 0) & (top_k < V):
            threshold = _threshold(row, V, peak, temperature, threshold, top_k.to(tl.float64), False, LANES)
            count, _ = _amounts(row, V, peak, temperature, threshold, BLOCK)
            ties = top_k.to(tl.int32) - count
        min_p = tl.load(min_ps + program).to(tl.float32)
        if min_p > 0:
            likely = _order(peak + temperature * tl.log(min_p))
            ties = tl.where(likely > threshold, V, ties)
            threshold = tl.maximum(likely, threshold)
        if top_p < 1:
            seen = 0
            total = tl.zeros([], tl.float64)
            for begin in tl.range(0, V, BLOCK, num_stages=STAGES):
                id = begin + tl.arange(0, BLOCK)
                x = tl.load(row + id, mask=id < V, other=-float("inf"))
                weight, seen = _kept(x, id, V, peak, temperature, threshold, ties, seen)
                total += tl.sum(weight).to(tl.float64)
            wanted = top_p * total
            lowest = threshold
            threshold = tl.maximum(_threshold(row, V, peak, temperature, lowest, wanted, True, LANES), lowest)
            _, above = _amounts(row, V, peak, temperature, threshold, BLOCK)
            bits = tl.where(threshold >= 2147483648, threshold ^ 2147483648, ~threshold)
            at = tl.exp((bits.to(tl.float32, bitcast=True) - peak) / temperature).to(tl.float64)
            needed = tl.ceil((wanted - above) / at).to(tl.int32)
            ties = tl.where(threshold == lowest, tl.minimum(needed, ties), needed)
            ties = tl.maximum(ties, 1)

        seen = 0
        total = tl.zeros([], tl.float64)
        for begin in tl.range(0, V, BLOCK, num_stages=STAGES):
            id = begin + tl.arange(0, BLOCK)
            x = tl.load(row + id, mask=id < V, other=-float("inf"))
            weight, seen = _kept(x, id, V, peak, temperature, threshold, ties, seen)
            total += tl.sum(weight).to(tl.float64)
        target = tl.rand(tl.load(seeds + program), tl.load(positions + program)).to(tl.float64) * total
        seen = 0
        before = tl.zeros([], tl.float64)
        found = False
        for begin in tl.range(0, V, BLOCK, num_stages=STAGES):
            if not found:
                id = begin + tl.arange(0, BLOCK)
                x = tl.load(row + id, mask=id < V, other=-float("inf"))
                weight, seen = _kept(x, id, V, peak, temperature, threshold, ties, seen)
                after = before + tl.sum(weight).to(tl.float64)
                if after > target:
                    passed = (before + tl.cumsum(weight).to(tl.float64) > target) & (weight > 0)
                    first = tl.min(tl.where(passed, id, V))
                    last = tl.max(tl.where(weight > 0, id, 0))  # where rounding of the two sums differs
                    best = tl.where(first < V, first, last)
                    found = True
                before = after
    tl.store(ids + program, best)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """One token id for each row, as reference_sampling.sample says, with weights in fp32 and their sums in fp64.

    logits [R, V] fp32 (-inf: never), temperature, top_k, top_p, min_p, seed, position [R] -> [R] int64.
    """
    check_rows("sample", logits=logits)
    check_dtype("sample", torch.float32, logits=logits)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _sample[(len(logits),)](
            logits, temperature, top_k, top_p, min_p, seed, position, ids, logits.shape[1], logits.stride(0), BLOCK,
            LANES, num_warps=WARPS,
        )  # fmt: skip
    return ids


@triton.jit
def _greedy(logits, ids, V, logits_stride, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * logits_stride
    best = tl.arange(0, BLOCK)  # of each lane
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in tl.range(0, V, BLOCK, num_stages=STAGES):
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row + id, mask=id < V, other=-float("inf"))
        best = tl.where(x > peak, id, best)
        peak = tl.maximum(peak, x)
    tl.store(ids + program, tl.min(tl.where(peak == tl.max(peak), best, V)))


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row, the lowest id where equal: torch's reduction gives a row alone to few threads.

    logits [R, V] fp32 -> [R] int64.
    """
    check_rows("greedy", logits=logits)
    check_dtype("greedy", torch.float32, logits=logits)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _greedy[(len(logits),)](logits, ids, logits.shape[1], logits.stride(0), BLOCK, num_warps=WARPS)
    return ids


@triton.jit
def _penalise(
    logits, rows, seen, entries, repetitions, presences, frequencies, V, logits_stride, seen_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = logits + tl.load(rows + program).to(tl.int64) * logits_stride
    held = tl.load(seen + tl.load(entries + program).to(tl.int64) * seen_stride + id, mask=id < V, other=0)
    x = tl.load(row + id, mask=id < V, other=0.0)
    repetition = tl.load(repetitions + program)
    x = tl.where(held > 0, tl.where(x > 0, x / repetition, x * repetition), x)
    count = (held & (PROMPT_BIT - 1)).to(tl.float32)
    x -= tl.load(frequencies + program) * count + tl.where(count > 0, tl.load(presences + program), 0.0)
    tl.store(row + id, x, mask=id < V)


def penalise(
    logits: Tensor, rows: Tensor, seen: Tensor, entries: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Change `rows` of logits in place, as reference_sampling.penalise says, in one pass over them.

    logits [R, V] fp32, rows [P], seen [E, V] int32, entries [P]; the penalties are fp32 [P].
    """
    check_rows("penalise", logits=logits, seen=seen)
    check_dtype("penalise", torch.float32, logits=logits, repetition=repetition)
    check_dtype("penalise", torch.int32, seen=seen)
    if len(rows):
        _penalise[(len(rows), triton.cdiv(logits.shape[1], BLOCK))](
            logits, rows, seen, entries, repetition, presence, frequency, logits.shape[1], logits.stride(0),
            seen.stride(0), BLOCK, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _mask(logits, rows, allowed, V, logits_stride, allowed_stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(allowed + program.to(tl.int64) * allowed_stride + id // 32, mask=id < V, other=-1)
    row = logits + tl.load(rows + program).to(tl.int64) * logits_stride
    forbidden = ((words >> (id % 32)) & 1) == 0
    tl.store(row + id, tl.full([BLOCK], -float("inf"), tl.float32), mask=(id < V) & forbidden)


def mask(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Forbid tokens in `rows` of logits in place, as reference_sampling.mask says.

    logits [R, V] fp32, rows [P], allowed [P, at least V / 32] int32.
    """
    check_rows("mask", logits=logits, allowed=allowed)
    check_dtype("mask", torch.float32, logits=logits)
    check_dtype("mask", torch.int32, allowed=allowed)
    if len(rows):
        _mask[(len(rows), triton.cdiv(logits.shape[1], BLOCK))](
            logits, rows, allowed, logits.shape[1], logits.stride(0), allowed.stride(0), BLOCK, num_warps=WARPS
        )
