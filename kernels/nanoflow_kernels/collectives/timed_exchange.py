"""The local half of a collective whose other ranks are not there: it moves this rank's bytes and takes a given time.

For measurements of one rank alone. The values of the other ranks' rows are made up of this rank's.

Shape legend: T tokens, D columns; of the input and of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from nanoflow_kernels.checks import check_dtype, check_rows
from nanoflow_kernels.grid import granted_sms, programs
from nanoflow_kernels.interpreted import INTERPRETED

# A program has an SM to itself: it fills the register file, as the threads of a collective do that wait for others.
WARPS = 32
# Values of the output that a program writes at once, and parts of a sum that it reads at once: the bytes in flight that
# tens of GB/s of an SM take, without spilling.
COPIED, UNROLL_COPIED = 32768, 1
SUMMED, UNROLL_SUMMED = 16384, 4
MOST_COLUMNS = 8192


@triton.jit
def _wait_until(begin, nanoseconds):
    """Spin until so much time has passed since `begin`. The interpreter has no clock, and does not wait."""
    if not INTERPRETED:
        while globaltimer() - begin < nanoseconds:
            pass


@triton.jit(do_not_specialize=["T_in", "T_out", "nanoseconds"])
def _timed_exchange(
    x_ptr, out_ptr, scale, nanoseconds, T_in, D_in, T_out, D_out, x_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out[r, c] = scale * sum over i, j of x[r % T_in + i * T_out, c % D_in + j * D_out], evenly over the time.

    A program's k-th block of n is written when k / n of the time has passed, not before.
    """
    begin = tl.cast(0, tl.int64) if INTERPRETED else globaltimer()
    across, beside = tl.cdiv(D_out, COLUMNS), tl.cdiv(D_in, D_out)
    blocks = tl.cdiv(T_out, ROWS) * across
    first, step = tl.program_id(0), tl.num_programs(0)
    mine, time = tl.cdiv(blocks - first, step), tl.cast(nanoseconds, tl.int64)
    for block in range(first, blocks, step):
        row = block // across * ROWS + tl.arange(0, ROWS)[:, None]
        column = block % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in tl.range(0, tl.cdiv(T_in, T_out) * beside, loop_unroll_factor=UNROLL):
            from_row, from_column = row % T_in + part // beside * T_out, column % D_in + part % beside * D_out
            inside = (from_row < T_in) & (from_column < D_in)
            from_ptr = x_ptr + from_row.to(tl.int64) * x_stride + from_column
            total += tl.load(from_ptr, mask=inside, other=0).to(tl.float32)
        _wait_until(begin, time * (block // step) // mine)
        to_ptr = out_ptr + row.to(tl.int64) * out_stride + column
        tl.store(to_ptr, (scale * total).to(out_ptr.dtype.element_ty), mask=(row < T_out) & (column < D_out))
    _wait_until(begin, time)


def timed_exchange(x: Tensor, *, out: Tensor, scale: float, us: float, num_sms: int | None = None) -> None:
    """Read all of x, write all of out, and end no sooner than `us` microseconds after the start.

    Where x has more rows or columns than out, their blocks are added up, as in a reduce-scatter; where it has fewer,
    they are repeated, as in an all-gather. Sums are multiplied by `scale`. x [T, D], out [T', D'] of one floating
    dtype. Each of num_sms SMs (None: all) has one program, where there are as many rows.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so; num_sms is not positive; us is
            negative, or a second or more.
    """
    check_rows("timed_exchange", x=x, out=out)
    check_dtype("timed_exchange", x.dtype, out=out)
    if not 0 <= us < 1e6:
        raise ValueError(f"timed_exchange: us: expected 0 or more, below 1,000,000, got {us}")
    tokens, width = out.shape
    sms = granted_sms(num_sms, x.device)
    if not out.numel():
        return
    if not x.numel():
        raise ValueError(f"timed_exchange: x: expected some values, got shape {tuple(x.shape)}")
    is_sum = x.shape[0] > tokens or x.shape[1] > width
    block, unroll = (SUMMED, UNROLL_SUMMED) if is_sum else (COPIED, UNROLL_COPIED)
    columns = min(triton.next_power_of_2(width), MOST_COLUMNS)
    rows = max(1, min(block // columns, triton.next_power_of_2(triton.cdiv(tokens, sms)) // 2))
    blocks = triton.cdiv(tokens, rows) * triton.cdiv(width, columns)
    _timed_exchange[(programs(blocks, num_sms, x.device, per_sm=1),)](
        x, out, scale, round(1e3 * us), *x.shape, *out.shape, x.stride(0), out.stride(0),
        ROWS=rows, COLUMNS=columns, UNROLL=unroll, num_warps=WARPS,
    )  # fmt: skip
