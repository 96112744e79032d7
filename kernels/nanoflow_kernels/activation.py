"""SwiGLU: silu(gate) * up.

Shape legend: T tokens, F columns of one gate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoflow_kernels.grid import programs
from nanoflow_kernels.operands import check_dtype, check_rows, check_shape

BLOCK = 2048  # columns a program takes at once


@triton.jit
def _swiglu(gate_up, out, T, F, groups, gate_up_stride, out_stride, BLOCK: tl.constexpr):
    blocks = tl.cdiv(F, BLOCK)
    for item in range(tl.program_id(0), T * groups * blocks, tl.num_programs(0)):
        row = tl.cast(item // (groups * blocks), tl.int64)
        group = item // blocks % groups
        column = item % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < F
        pair = gate_up + row * gate_up_stride + 2 * group * F + column
        gate = tl.load(pair, mask=inside, other=0).to(tl.float32)
        up = tl.load(pair + F, mask=inside, other=0).to(tl.float32)
        y = gate / (1 + tl.exp(-gate)) * up
        tl.store(out + row * out_stride + group * F + column, y.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor, *, groups: int = 1, out: Tensor, num_sms: int | None = None) -> None:
    """silu(gate) * up, for each of `groups` adjacent [gate, up] pairs of a row.

    gate_up [T, groups 2 F] -> [T, groups F], of one dtype.
    """
    tokens, columns = out.shape
    check_rows("swiglu", gate_up=gate_up, out=out)
    check_dtype("swiglu", gate_up.dtype, out=out)
    check_shape("swiglu", "gate_up", gate_up, tokens, 2 * columns)
    if columns % groups:
        raise ValueError(f"swiglu: groups: expected a divisor of {columns} columns, got {groups}")
    if tokens == 0:
        return
    width = columns // groups
    grid = (programs(tokens * groups * triton.cdiv(width, BLOCK), num_sms, out.device, per_sm=16),)
    _swiglu[grid](gate_up, out, tokens, width, groups, gate_up.stride(0), out.stride(0), BLOCK, num_warps=8)
