"""Dense products, alone and with SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """Compute x weight^T + bias; a wider `out` gets the unrounded sums.

    x [T, in], weight [out, in], bias [out] -> [T, out], of x's dtype or fp32.
    """
    if out.dtype != x.dtype:
        x, weight, bias = x.to(out.dtype), weight.to(out.dtype), None if bias is None else bias.to(out.dtype)
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def linear_swiglu(x: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Compute silu(x gate^T) * (x up^T), where row 2 i of the weight is gate i and row 2 i + 1 is up i.

    x [T, in], weight [2 F, in] -> [T, F].
    """
    out.copy_(gated(x @ weight.T))


def gated(pairs: Tensor, run: int = 1) -> Tensor:
    """silu(gate) * up [T, F] in fp32, of columns [T, 2 F] that are `run` gates, `run` ups, and so on."""
    gate, up = pairs.float().unflatten(1, (-1, 2, run)).unbind(2)
    product: Tensor = F.silu(gate) * up
    return product.flatten(1)
