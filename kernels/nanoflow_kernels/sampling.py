"""Sampling on the device, without waiting for the host, in a few passes over a row; reference_sampling defines it.

Every restriction (min_p, top_k, top_p) keeps the ids above a threshold of the logit, and of those at it the lowest few.
Thresholds are found three bits at a time, from the top: one pass over the row says how many ids, or how much of their
mass, is at or above each of seven candidates. Logits are compared as unsigned integers of the same order.

Shape legend: R rows, V vocabulary, P of the rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows
from nanoflow_kernels.reference_sampling import IN_PROMPT, logprobs

__all__ = ["greedy", "logprobs", "mask", "penalise", "sample"]

SAMPLING_IDS = 8192  # that a program looks at at once
THRESHOLD_IDS = 2048  # the same, where it compares each with seven candidates
SAMPLING_WARPS = 16
SAMPLING_STAGES = tl.constexpr(3)  # blocks on their way
PROMPT_BIT = tl.constexpr(IN_PROMPT)


@triton.jit
def _order(x):
    """Map fp32 to uint32 so that x < y where the results are; both zeros are the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def _threshold(row_ptr, V, highest_logit, temperature, floor, wanted, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """max {t : sum of a_i over the ids i of order >= t and >= floor is at least wanted}, in the order of _order.

    a_i = 1, or with BY_MASS exp((x_i - highest_logit) / temperature). Radix selection, three bits at a time.
    """
    digit = tl.arange(0, 8)
    threshold = tl.zeros([], tl.uint32)
    group = 0
    while group < 11:
        shift = 30 - 3 * group
        candidate = threshold | (digit.to(tl.uint32) << shift)
        real = (digit > 0) & ((group > 0) | (digit < 4))  # of the first group two bits are left
        amounts = tl.zeros([8, BLOCK], tl.float32)
        for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
            id = begin + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
            order = _order(x)
            amount = tl.exp((x - highest_logit) / temperature) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
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
def _amounts(row_ptr, V, highest_logit, temperature, threshold, BLOCK: tl.constexpr):
    """The number of ids of order > threshold, and the sum of exp((x - highest_logit) / temperature) over them."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.float64)
    for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
        above = (id < V) & (_order(x) > threshold)
        count += tl.sum(above.to(tl.int32))
        mass += tl.sum(tl.where(above, tl.exp((x - highest_logit) / temperature), 0.0)).to(tl.float64)
    return count, mass


@triton.jit
def _kept(x, id, V, highest_logit, temperature, threshold, ties, seen):
    """Weights of a block's ids, exp((x - highest_logit) / temperature) or 0 if excluded, and how many ids at the
    threshold were seen up to the block's end, of which the first `ties` are kept.
    """
    order = _order(x)
    tie = ((order == threshold) & (id < V)).to(tl.int32)
    keep = (order > threshold) | ((tie != 0) & (seen + tl.cumsum(tie) <= ties))
    return tl.where(keep & (id < V), tl.exp((x - highest_logit) / temperature), 0.0), seen + tl.sum(tie)


@triton.jit
def _sample(
    logits_ptr, temperatures_ptr, top_ks_ptr, top_ps_ptr, min_ps_ptr, seeds_ptr, positions_ptr, ids_ptr,
    V, logits_stride,
    BLOCK: tl.constexpr, THRESHOLD_BLOCK: tl.constexpr,
):  # fmt: skip
    """id = min {i : w_0 + .. + w_i > u sum(w)}, w = exp((x - max x) / temperature) of the ids that are kept, else 0.

    u is uniform by Philox on (seed, position). A row of temperature 0 gets argmax(x). One program a row.
    Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011 (Philox).
    """
    program = tl.program_id(0)
    row_ptr = logits_ptr + program.to(tl.int64) * logits_stride
    highest_logit = -float("inf")
    best = 0
    for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
        block_highest = tl.max(x)
        best = tl.where(block_highest > highest_logit, begin + tl.argmax(x, 0), best)
        highest_logit = tl.maximum(block_highest, highest_logit)
    temperature = tl.load(temperatures_ptr + program).to(tl.float32)
    if temperature > 0:
        top_k, top_p = tl.load(top_ks_ptr + program), tl.load(top_ps_ptr + program).to(tl.float64)
        threshold = tl.zeros([], tl.uint32)
        ties = V
        if (top_k > 0) & (top_k < V):
            threshold = _threshold(
                row_ptr, V, highest_logit, temperature, threshold, top_k.to(tl.float64), False, THRESHOLD_BLOCK
            )
            count, _ = _amounts(row_ptr, V, highest_logit, temperature, threshold, BLOCK)
            ties = top_k.to(tl.int32) - count
        min_p = tl.load(min_ps_ptr + program).to(tl.float32)
        if min_p > 0:
            likely = _order(highest_logit + temperature * tl.log(min_p))
            ties = tl.where(likely > threshold, V, ties)
            threshold = tl.maximum(likely, threshold)
        if top_p < 1:
            seen = 0
            total = tl.zeros([], tl.float64)
            for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
                id = begin + tl.arange(0, BLOCK)
                x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
                weight, seen = _kept(x, id, V, highest_logit, temperature, threshold, ties, seen)
                total += tl.sum(weight).to(tl.float64)
            wanted = top_p * total
            lowest = threshold
            threshold = tl.maximum(
                _threshold(row_ptr, V, highest_logit, temperature, lowest, wanted, True, THRESHOLD_BLOCK), lowest
            )
            _, above = _amounts(row_ptr, V, highest_logit, temperature, threshold, BLOCK)
            bits = tl.where(threshold >= 2147483648, threshold ^ 2147483648, ~threshold)
            at = tl.exp((bits.to(tl.float32, bitcast=True) - highest_logit) / temperature).to(tl.float64)
            needed = tl.ceil((wanted - above) / at).to(tl.int32)
            ties = tl.where(threshold == lowest, tl.minimum(needed, ties), needed)
            ties = tl.maximum(ties, 1)

        seen = 0
        total = tl.zeros([], tl.float64)
        for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
            id = begin + tl.arange(0, BLOCK)
            x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
            weight, seen = _kept(x, id, V, highest_logit, temperature, threshold, ties, seen)
            total += tl.sum(weight).to(tl.float64)
        target = tl.rand(tl.load(seeds_ptr + program), tl.load(positions_ptr + program)).to(tl.float64) * total
        seen = 0
        before = tl.zeros([], tl.float64)
        found = False
        for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
            if not found:
                id = begin + tl.arange(0, BLOCK)
                x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
                weight, seen = _kept(x, id, V, highest_logit, temperature, threshold, ties, seen)
                after = before + tl.sum(weight).to(tl.float64)
                if after > target:
                    passed = (before + tl.cumsum(weight).to(tl.float64) > target) & (weight > 0)
                    first = tl.min(tl.where(passed, id, V))
                    last = tl.max(tl.where(weight > 0, id, 0))  # where rounding of the two sums differs
                    best = tl.where(first < V, first, last)
                    found = True
                before = after
    tl.store(ids_ptr + program, best)


def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor, position: Tensor
) -> Tensor:
    """Draw one token id for each row, as reference_sampling.sample does, with weights in fp32 and their sums in fp64.

    logits [R, V] fp32 (-inf: never); [R] temperature, top_p and min_p fp64, top_k (0: all), seed and position int64
    -> ids [R] int64.

    Raises:
        ValueError: logits are no fp32 matrix of contiguous rows.
    """
    check_rows("sample", logits=logits)
    check_dtype("sample", torch.float32, logits=logits)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _sample[(len(logits),)](
            logits, temperature, top_k, top_p, min_p, seed, position, ids, logits.shape[1], logits.stride(0),
            SAMPLING_IDS, THRESHOLD_IDS, num_warps=SAMPLING_WARPS,
        )  # fmt: skip
    return ids


@triton.jit
def _greedy(logits_ptr, ids_ptr, V, logits_stride, BLOCK: tl.constexpr):
    """id = min {i : x_i = max x}, one program a row."""
    program = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + program * logits_stride
    best = tl.arange(0, BLOCK)  # of each column
    highest = tl.full([BLOCK], -float("inf"), tl.float32)
    for begin in tl.range(0, V, BLOCK, num_stages=SAMPLING_STAGES):
        id = begin + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + id, mask=id < V, other=-float("inf"))
        best = tl.where(x > highest, id, best)
        highest = tl.maximum(highest, x)
    tl.store(ids_ptr + program, tl.min(tl.where(highest == tl.max(highest), best, V)))


def greedy(logits: Tensor) -> Tensor:
    """Find the most likely token of each row, the lowest id where equal.

    torch.argmax is not used because it reduces a row that is alone on few threads.

    logits [R, V] fp32 -> ids [R] int64.

    Raises:
        ValueError: logits are no fp32 matrix of contiguous rows.
    """
    check_rows("greedy", logits=logits)
    check_dtype("greedy", torch.float32, logits=logits)
    ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(logits):
        _greedy[(len(logits),)](logits, ids, logits.shape[1], logits.stride(0), SAMPLING_IDS, num_warps=SAMPLING_WARPS)
    return ids


@triton.jit
def _penalise(
    logits_ptr, rows_ptr, seen_ptr, entries_ptr, repetitions_ptr, presences_ptr, frequencies_ptr,
    V, logits_stride, seen_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x = x / r where x > 0, else x r, of ids in prompt or output; then x -= f c + (s where c > 0).

    r, s, f: the repetition, presence and frequency penalties; c: how often the output has the id.
    References: Keskar et al., "CTRL", 2019 (r); OpenAI's API reference (s, f).
    """
    program = tl.program_id(0)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_ptr = logits_ptr + tl.load(rows_ptr + program).to(tl.int64) * logits_stride
    held = tl.load(seen_ptr + tl.load(entries_ptr + program).to(tl.int64) * seen_stride + id, mask=id < V, other=0)
    x = tl.load(row_ptr + id, mask=id < V, other=0.0)
    repetition = tl.load(repetitions_ptr + program)
    x = tl.where(held > 0, tl.where(x > 0, x / repetition, x * repetition), x)
    count = (held & (PROMPT_BIT - 1)).to(tl.float32)
    x -= tl.load(frequencies_ptr + program) * count + tl.where(count > 0, tl.load(presences_ptr + program), 0.0)
    tl.store(row_ptr + id, x, mask=id < V)


def penalise(
    logits: Tensor, rows: Tensor, seen: Tensor, entries: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Penalise tokens that were seen, in `rows` of logits and in place, as reference_sampling.penalise does.

    logits [R, V] fp32, rows [P], seen [E, V] int32: how often the output has a token, plus IN_PROMPT; entries [P]: the
    row of `seen` for each of `rows`; the penalties are fp32 [P].

    Raises:
        ValueError: names the operand whose strides, dtype or device is not so.
    """
    check_rows("penalise", logits=logits, seen=seen)
    check_dtype("penalise", torch.float32, logits=logits, repetition=repetition)
    check_dtype("penalise", torch.int32, seen=seen)
    if len(rows):
        _penalise[(len(rows), triton.cdiv(logits.shape[1], SAMPLING_IDS))](
            logits, rows, seen, entries, repetition, presence, frequency, logits.shape[1], logits.stride(0),
            seen.stride(0), SAMPLING_IDS, num_warps=SAMPLING_WARPS,
        )  # fmt: skip


@triton.jit
def _mask(logits_ptr, rows_ptr, allowed_ptr, V, logits_stride, allowed_stride, BLOCK: tl.constexpr):
    """x_i = -inf where bit i % 32 of word i // 32 is 0."""
    program = tl.program_id(0)
    id = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(allowed_ptr + program.to(tl.int64) * allowed_stride + id // 32, mask=id < V, other=-1)
    row_ptr = logits_ptr + tl.load(rows_ptr + program).to(tl.int64) * logits_stride
    forbidden = ((words >> (id % 32)) & 1) == 0
    tl.store(row_ptr + id, tl.full([BLOCK], -float("inf"), tl.float32), mask=(id < V) & forbidden)


def mask(logits: Tensor, rows: Tensor, allowed: Tensor) -> None:
    """Forbid tokens in `rows` of logits and in place, as reference_sampling.mask does.

    logits [R, V] fp32, rows [P], allowed [P, at least V / 32] int32: bit i % 32 of word i // 32 is token i's.

    Raises:
        ValueError: names the operand whose strides, dtype or device is not so.
    """
    check_rows("mask", logits=logits, allowed=allowed)
    check_dtype("mask", torch.float32, logits=logits)
    check_dtype("mask", torch.int32, allowed=allowed)
    if len(rows):
        _mask[(len(rows), triton.cdiv(logits.shape[1], SAMPLING_IDS))](
            logits, rows, allowed, logits.shape[1], logits.stride(0), allowed.stride(0),
            SAMPLING_IDS, num_warps=SAMPLING_WARPS,
        )  # fmt: skip
