"""Dense products, alone and with SwiGLU; by shapes and SMs each goes to cuBLAS or to one of our kernels.

A few tokens go to gemm_small_m, products on few SMs and those with SwiGLU to gemm_persistent, all others to cuBLAS.

Shape legend: T tokens, F columns of SwiGLU's result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from nanoflow_kernels.checks import are_bulk, check_bulk, check_dtype, check_rows, check_shape
from nanoflow_kernels.gemm.persistent import gemm_persistent
from nanoflow_kernels.gemm.small_m import gemm_small_m, is_small_m


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor, num_sms: int | None = None) -> None:
    """Compute x weight^T + bias; an fp32 `out` of narrower operands gets the unrounded sums.

    On few SMs cuBLAS loses more than its share of speed, so there it only gets operands that bulk copies do not take:
    those whose rows begin at other places than multiples of 16 bytes.

    x [T, in], weight [out, in], bias [out] of one floating dtype -> [T, out], of x's dtype or fp32.

    Raises:
        ValueError: names the operand whose strides, dtype or device is not so, or num_sms if not positive.
    """
    check_rows("linear", x=x, weight=weight, out=out)
    if len(x) == 0:
        return
    wider = out.dtype != x.dtype
    if wider and (out.dtype != torch.float32 or x.device.type == "cpu"):
        raise ValueError(f"linear: out: expected {x.dtype}, or on a GPU float32, got {out.dtype} on {out.device}")
    if bias is None and not wider and is_small_m(x, weight):
        gemm_small_m(x, weight, swiglu=False, out=out, num_sms=num_sms)
    elif num_sms is not None and not wider and are_bulk(x, weight, out):
        gemm_persistent(x, weight, bias, swiglu=False, out=out, num_sms=num_sms)
    else:
        with _sm_target(num_sms):
            _cublas(x, weight, bias, out)


def _cublas(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if out.dtype != x.dtype:
        torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
        if bias is not None:
            out.add_(bias)
    elif bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


@contextmanager
def _sm_target(num_sms: int | None) -> Iterator[None]:
    """Tell cuBLAS for how many SMs to choose its tiles. It may use more."""
    if num_sms is None or not torch.cuda.is_available():
        yield
        return
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    _library().cublasSetSmCountTarget(handle, num_sms)
    try:
        yield
    finally:
        _library().cublasSetSmCountTarget(handle, 0)  # the handle is shared by every product on this stream


@cache
def _library() -> ctypes.CDLL:
    """The cuBLAS that torch has loaded."""
    torch.cuda.current_blas_handle()
    return ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).split('.')[0]}")


def linear_swiglu(x: Tensor, weight: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
    """Compute silu(x gate^T) * (x up^T), where row 2 i of the weight is gate i and row 2 i + 1 is up i.

    x [T, in], weight [2 F, in] -> [T, F], of one floating dtype, whose rows begin at multiples of 16 bytes.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    check_rows("linear_swiglu", x=x, weight=weight, out=out)
    check_dtype("linear_swiglu", x.dtype, weight=weight, out=out)
    check_shape("linear_swiglu", "weight", weight, 2 * out.shape[1], x.shape[1])
    check_shape("linear_swiglu", "out", out, len(x), out.shape[1])
    check_bulk("linear_swiglu", x=x, weight=weight, out=out)
    if len(x) == 0:
        return
    if is_small_m(x, weight):
        gemm_small_m(x, weight, swiglu=True, out=out, num_sms=num_sms)
    else:
        gemm_persistent(x, weight, swiglu=True, out=out, num_sms=num_sms)
