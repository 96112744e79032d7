"""Tensors are compared by their relative RMS error, with the quantity named."""

from __future__ import annotations

from torch import Tensor

from benchmarks.accuracy.relative_rms import relative_rms


def assert_close(quantity: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, f"{quantity}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert not actual.isnan().any(), f"{quantity}: {int(actual.isnan().sum())} elements are NaN"
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"{quantity}: relative RMS error {error:.2e}, expected at most {tolerance:.0e}"
