"""Programmatic dependent launch: a kernel starts while the one before it on its stream still ends.

Such a kernel calls `await_earlier` before it reads what another kernel has written, or writes what one may read. The
wait is for the whole kernel before, which has waited likewise, so it is for all of them. Before it a kernel may read
what no kernel of a step's chain writes: weights, positions, slots, page table, AttentionWork. With `release_next` the
next kernel is given what room there is once every program has called it: a kernel of few or light programs calls it
first, one that fills the SMs when its reading is done.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

ROWS = 16  # at most: of a larger batch the time between kernels is no part worth the room that waiting programs take


@triton.jit
def await_earlier(CHAINED: tl.constexpr):
    if CHAINED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_next(CHAINED: tl.constexpr):
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(addresses, BYTES: tl.constexpr):
    """Bring BYTES (a multiple of 16, as the addresses are) from each of these addresses on into the L2 cache."""
    size = tl.full(addresses.shape, BYTES, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [addresses, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def is_chained(rows: int, device: torch.device) -> bool:
    """Whether a kernel on so many rows is launched this way. It needs Hopper; the interpreter knows nothing of it."""
    return rows <= ROWS and device.type == "cuda" and _has_hopper(device)


@cache
def _has_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
