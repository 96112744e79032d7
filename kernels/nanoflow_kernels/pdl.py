"""Programmatic dependent launch (PDL) lets a kernel start while the kernel before it on its stream still ends.

A kernel that is launched so calls `wait_for_earlier` before it reads what another kernel has written, or writes what
another kernel may read. The wait is for the whole kernel before, which has itself waited for the one before it, so it
covers all of them. Before the wait a kernel may only read what no kernel of a step writes: weights, positions, slots,
the page table and the AttentionPlan.

`launch_dependents` lets the next kernel start as soon as every program of this one has called it and there is room. A
kernel of few or light programs calls it first; a kernel that fills the SMs calls it when its reading is done.

Source: NVIDIA, "Programmatic Dependent Launch and Synchronization", CUDA C++ Programming Guide; PTX ISA,
`griddepcontrol`.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

# Rows of a batch, at most: beyond, the room that waiting programs take on the SMs costs more than the time between
# kernels (12 layers of Llama-3-8B on H200: 2 to 4 % gained up to 128 rows, .5 % at 256, 2 % lost at 512).
MAX_PDL_ROWS = 256


@triton.jit
def wait_for_earlier(PDL: tl.constexpr):
    """Wait until the kernel before this one has ended and its writes are visible (griddepcontrol.wait)."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Allow the next kernel to start (griddepcontrol.launch_dependents)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_l2(addresses, BYTES: tl.constexpr):
    """Bring BYTES (a multiple of 16, as the addresses are) from each of these addresses on into the L2 cache."""
    size = tl.full(addresses.shape, BYTES, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [addresses, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def uses_pdl(rows: int, device: torch.device) -> bool:
    """Whether a kernel on so many rows is launched this way. It needs Hopper; the interpreter does not know it."""
    return rows <= MAX_PDL_ROWS and device.type == "cuda" and _has_hopper(device)


@cache
def _has_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
