"""The spin kernel keeps every SM awake with nothing useful to do: a GPU then draws its static power."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _spin(out, rounds):  # type: ignore[no-untyped-def]
    number = tl.program_id(0)
    for _ in range(rounds):
        number = number * 1664525 + 1013904223
    tl.store(out + tl.program_id(0), number)


def spin(rounds: int, *, out: Tensor) -> None:
    """Let one warp on each SM compute `rounds` integers; `out` [SMs], int32, receives the last one of each."""
    _spin[(len(out),)](out, rounds, num_warps=1)
