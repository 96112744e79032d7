"""What every kernel asks of its operands, checked on the host before a launch."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(kernel: str, **operands: Tensor) -> None:
    """Matrices whose rows are contiguous (a row may be part of a wider one), all on one device.

    Raises:
        ValueError: names the operand.
    """
    first, device = next((name, tensor.device) for name, tensor in operands.items())
    for name, tensor in operands.items():
        if tensor.ndim != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ValueError(
                f"{kernel}: {name}: expected a matrix of contiguous rows, got shape {tuple(tensor.shape)} "
                f"with strides {tensor.stride()}"
            )
        if tensor.device != device:
            raise ValueError(f"{kernel}: {name}: expected on {device}, where {first} is, got {tensor.device}")


def check_dtype(kernel: str, dtype: torch.dtype, **operands: Tensor) -> None:
    """Raises:
    ValueError: names the operand that is of another dtype.
    """
    for name, tensor in operands.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{kernel}: {name}: expected {dtype}, got {tensor.dtype}")


def check_bulk(kernel: str, **operands: Tensor) -> None:
    """What bulk copies ask of a matrix: rows that begin at multiples of 16 bytes.

    Raises:
        ValueError: names the operand.
    """
    for name, tensor in operands.items():
        row_bytes = tensor.stride(0) * tensor.element_size()
        if row_bytes % 16 or tensor.data_ptr() % 16:
            raise ValueError(f"{kernel}: {name}: expected rows at multiples of 16 bytes, got one every {row_bytes}")


def check_shape(kernel: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Raises:
    ValueError: names the operand and both shapes.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{kernel}: {name}: expected shape {shape}, got {tuple(tensor.shape)}")
