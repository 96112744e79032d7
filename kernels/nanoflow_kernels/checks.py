"""Checks of a kernel's operands on the host, before a launch; every error names the kernel and the operand."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(kernel: str, **operands: Tensor) -> None:
    """Check that operands are matrices whose rows are contiguous (a row may be part of a wider one), on one device.

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
    """Check that operands are of this dtype.

    Raises:
        ValueError: names the operand that is of another one.
    """
    for name, tensor in operands.items():
        if tensor.dtype != dtype:
            raise ValueError(f"{kernel}: {name}: expected {dtype}, got {tensor.dtype}")


def are_bulk(*operands: Tensor) -> bool:
    """Whether bulk copies take these matrices: their rows begin at multiples of 16 bytes."""
    return all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in operands)


def check_bulk(kernel: str, **operands: Tensor) -> None:
    """Check that bulk copies take these matrices.

    Raises:
        ValueError: names the operand that they do not take.
    """
    for name, tensor in operands.items():
        if not are_bulk(tensor):
            row_bytes = tensor.stride(0) * tensor.element_size()
            raise ValueError(f"{kernel}: {name}: expected rows at multiples of 16 bytes, got one every {row_bytes}")


def check_shape(kernel: str, name: str, tensor: Tensor, *shape: int) -> None:
    """Check an operand's shape.

    Raises:
        ValueError: names the operand and both shapes.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{kernel}: {name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_pages(kernel: str, pages: Tensor, dtype: torch.dtype, kv_scales: Tensor | None) -> None:
    """Check that pages are of `dtype`, or of e4m3 with kv_scales [2] fp32.

    Raises:
        ValueError: names the operand that is not so.
    """
    check_dtype(kernel, dtype if kv_scales is None else torch.float8_e4m3fn, pages=pages)
    if kv_scales is not None:
        check_dtype(kernel, torch.float32, kv_scales=kv_scales)
        check_shape(kernel, "kv_scales", kv_scales, 2)
