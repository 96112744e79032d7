"""The gate of SwiGLU on a tile in registers: what the epilogues of products share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gated(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * up [ROWS, COLUMNS / 2] of pairs [ROWS, COLUMNS] whose columns alternate gate and up, fp32."""
    gate, up = tl.split(pairs.reshape(ROWS, COLUMNS // 2, 2))
    return gate / (1 + tl.exp(-gate)) * up
