"""The peer barrier: each program of a launch waits for the program of its number on every other rank.

Who is through sees all that the others wrote before. Programs wait one by one, not launch by launch, so that none
waits for a program that has not started; a launch has to divide its work so that a program needs no other's.

A signal is the number of the call in which it is given, its *epoch*, which only grows: nothing is ever set back, a late
reader is never misled by an early one, and what is on a pad stays right when a CUDA graph is replayed.

Source of the orders: PTX ISA, "Memory Consistency Model" (release and acquire patterns; a barrier of the program makes
them cover all its threads).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nanoflow_kernels.collectives.peers import MAX_PROGRAMS, MAX_RANKS
from nanoflow_kernels.interpreted import INTERPRETED

LANES = tl.constexpr(MAX_RANKS)
PAD_PROGRAMS = tl.constexpr(MAX_PROGRAMS)
# Who waits reads the abort word, in host memory, once in so many turns: some 10 ms, later than any wait that ends well.
# Read every 128 turns, its reads filled the bus and held up all else: 8 ranks' exchange of 64 MiB took 136 ms on an
# H200, and takes .7 ms now (benchmarks/results/collectives_abort_word_h200.json).
TURNS = tl.constexpr(64 if INTERPRETED.value else 1 << 14)
WIDEST = tl.constexpr(1024)  # threads of a program


@triton.jit
def begin_call(counters_ptr):
    """The epoch of this call, from 1."""
    return tl.load(counters_ptr) + 1


@triton.jit
def end_call(counters_ptr, epoch):
    """Count the call, once all its programs have come here. The kernel after this one sees it."""
    tl.debug_barrier()  # all threads have read the epoch
    if tl.atomic_add(counters_ptr + 1, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counters_ptr + 1, 0)
        tl.store(counters_ptr, epoch)


@triton.jit
def peer_barrier(pads_ptr, abort_ptr, rank, epoch, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """Tell the programs of this number that this rank has come so far, and wait for all of them, or for the abort."""
    lane = tl.arange(0, LANES)
    exists = lane < RANKS
    place = (PHASE * PAD_PROGRAMS + tl.program_id(0)) * LANES
    pads = tl.load(pads_ptr + lane, mask=exists, other=0).to(tl.pointer_type(tl.int64))
    tl.debug_barrier()  # what all threads have written comes before the signal of one
    tl.atomic_xchg(pads + (place + rank), epoch + tl.zeros([LANES], tl.int64), mask=exists, sem="release", scope="sys")
    signals = tl.load(pads_ptr + rank).to(tl.pointer_type(tl.int64)) + place
    waits, turn = True, tl.cast(0, tl.int32)
    while waits:
        # An addition of 0 is a load whose result all threads get from one, so that they agree on when to go on.
        seen = tl.atomic_add(signals + lane, tl.zeros([LANES], tl.int64), mask=exists, sem="acquire", scope="sys")
        waits = tl.min(tl.where(exists, seen, epoch)) < epoch
        turn += 1
        if turn % TURNS == 0:
            # A maximum over all threads, for the same reason. (An addition might undo what the host writes.)
            aborted = tl.max(tl.load(abort_ptr + tl.zeros([WIDEST], tl.int32), volatile=True))
            waits = waits & (aborted == 0)
    tl.debug_barrier()  # what one thread has acquired comes before what all read
