"""This module computes SwiGLU on a tile in registers: the epilogue that the products with a gate share."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from nanoflow_kernels.interpreted import INTERPRETED


@triton.jit
def swiglu(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * up, with silu(z) = z / (1 + exp(-z)).

    pairs [ROWS, COLUMNS] fp32, whose columns alternate gate and up -> [ROWS, COLUMNS / 2].
    Reference: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    gate, up = tl.split(pairs.reshape(ROWS, COLUMNS // 2, 2))
    return gated(gate, up)


@triton.jit
def gated(gate, up):
    """silu(gate) * up of two tiles of fp32.

    The device's fast operations err by a few units in the last place of fp32; the epilogue takes a third of the
    instructions with them.
    """
    if INTERPRETED:
        return gate / (1 + tl.exp(-gate)) * up
    else:
        return libdevice.fast_dividef(gate, 1 + libdevice.fast_expf(-gate)) * up
