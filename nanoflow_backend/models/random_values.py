"""fill_normal draws random tensors for measurements: values change the power that a GPU draws, and so its speed."""

from __future__ import annotations

import torch
from nanoflow_kernels.reference.rows import E4M3_MAX
from torch import Tensor

from nanoflow_backend.config.quantization import FP8

# Quantised rows of normal values: the largest of some thousand, which becomes 448, is about four deviations.
FP8_DEVIATION = E4M3_MAX / 4
PART = 1 << 26  # elements


def fill_normal(tensor: Tensor, deviation: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Fill a tensor [n, ...] of any floating dtype and strides with N(0, deviation), in place, and return it.

    e4m3, which torch draws no values of, is drawn in fp32, limited to its range and rounded. None: 1, or of e4m3 what
    quantised N(0, 1) has, FP8_DEVIATION.
    """
    if tensor.dtype is not getattr(torch, FP8):
        return tensor.normal_(0, 1.0 if deviation is None else deviation, generator=generator)
    for part in parts(tensor):
        drawn = torch.empty(part.shape, device=part.device)
        drawn.normal_(0, FP8_DEVIATION if deviation is None else deviation, generator=generator)
        part.copy_(drawn.clamp_(-E4M3_MAX, E4M3_MAX))
    return tensor


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor [n, ...] of some rows each, with PART elements or fewer, or one row: for work in fp32 that
    would not fit in memory on the whole."""
    return tuple(torch.split(tensor, max(1, PART * len(tensor) // max(1, tensor.numel()))))
