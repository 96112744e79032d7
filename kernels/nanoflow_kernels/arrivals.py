"""Counters of programs that have arrived: the last of those that share a piece of work finishes it.

A counter is zero between launches: who finds that it is the last sets it back. Each stream has counters of its own,
since kernels of one stream do not run side by side.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX_COUNTERS = 1024  # of a launch
MAX_STREAMS = 256  # the next one shares the counters of the first, which is long gone


def arrival_counters(count: int, device: torch.device) -> Tensor:
    """Counters for a launch on the current stream of this device: [count] int32, all zero.

    Raises:
        ValueError: a launch may not have so many.
    """
    if count > MAX_COUNTERS:
        raise ValueError(f"arrival counters: expected at most {MAX_COUNTERS} a launch, got {count}")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    streams = _streams(device)
    return _counters(device)[streams.setdefault(stream, len(streams) % MAX_STREAMS), :count]


@cache
def _counters(device: torch.device) -> Tensor:
    counters = torch.zeros((MAX_STREAMS, MAX_COUNTERS), dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # once: other streams use them too
    return counters


@cache
def _streams(device: torch.device) -> dict[int, int]:
    """The row of counters of each stream that has asked for some."""
    return {}
