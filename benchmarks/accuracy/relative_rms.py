"""This is the one measure of how far two tensors are apart."""

from __future__ import annotations

from torch import Tensor


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected`, in float64; 0 where both are empty or zero."""
    difference = (actual.double() - expected.double()).square().sum().sqrt()
    return float(difference / expected.double().square().sum().sqrt().clamp(min=1e-300))
