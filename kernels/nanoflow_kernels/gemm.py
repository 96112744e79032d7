"""Dense products: x weight^T + bias, by cuBLAS, or our own kernel where there are few tokens.

Shape legend: T tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from nanoflow_kernels.few_tokens import few_tokens, is_few
from nanoflow_kernels.operands import check_rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor, num_sms: int | None = None) -> None:
    """x weight^T + bias; an fp32 `out` of narrower operands gets the unrounded sums.

    num_sms: the SMs that cuBLAS plans its tiles for (a wish: it launches on an ordinary stream); None: all.
    x [T, in], weight [out, in], bias [out] -> [T, out], of x's dtype or fp32.
    """
    check_rows("linear", x=x, weight=weight, out=out)
    if len(x) == 0:
        return
    wider = out.dtype != x.dtype
    if wider and (out.dtype != torch.float32 or x.device.type == "cpu"):
        raise ValueError(f"linear: out: expected {x.dtype}, or on a GPU float32, got {out.dtype} on {out.device}")
    if bias is None and not wider and is_few(x, weight):
        few_tokens(x, weight, gated=False, out=out, num_sms=num_sms)
        return
    with _sm_target(num_sms):
        if not wider:
            if bias is None:
                torch.mm(x, weight.T, out=out)
            else:
                torch.addmm(bias, x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out_dtype=torch.float32, out=out)
            if bias is not None:
                out.add_(bias)


@contextmanager
def _sm_target(num_sms: int | None) -> Iterator[None]:
    if num_sms is None:
        yield
        return
    handle = ctypes.c_void_p(torch.cuda.current_blas_handle())
    _cublas().cublasSetSmCountTarget(handle, num_sms)
    try:
        yield
    finally:
        _cublas().cublasSetSmCountTarget(handle, 0)  # the handle is shared by every product on this stream


@cache
def _cublas() -> ctypes.CDLL:
    """The cuBLAS that torch has loaded."""
    torch.cuda.current_blas_handle()
    return ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).split('.')[0]}")
