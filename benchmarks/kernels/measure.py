"""A kernel is timed back to back for seconds, as it runs in a loaded engine: clock and power are steady by then.

A case is captured in a CUDA graph of calls that take turns with several sets of operands, so that none finds its inputs
in the cache; the graph is replayed until clock and power are steady, then for the time that is measured. Energy is the
device's energy counter over that time, also where a case has a few SMs of its own and the others rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nanoflow_kernels.grid import device_sms
from nanoflow_search.hardware.cuda_graphs import CapturedCalls
from nanoflow_search.hardware.sustain import sustain

from nanoflow_backend.runtime.gpu_meter import GpuMeter
from nanoflow_backend.runtime.green_contexts import lane_streams

READ_BYTES_PER_S = 4.57e12  # one H200, bulk copies of tiles without arithmetic
FLOP_PER_S = 672e12  # one H200, cuBLAS bf16 on random data in the sustained state (its clock falls under the power cap)
SETS = 4  # of operands that take turns


@dataclass(frozen=True)
class KernelCase:
    """One kernel with its operands, and the work that it must do."""

    name: str
    call: Callable[[int], Any]  # with the number of its set of operands
    bytes: float  # that it must move
    flop: float = 0.0
    sms: int | None = None  # of its own; None: all of the device


@dataclass(frozen=True)
class MeasuredKernel:
    """What one call takes. `of_roof`: the time that the roofs above allow over the time taken."""

    name: str
    duration_us: float
    tb_per_s: float
    gb_per_s_per_sm: float
    tflop_per_s: float
    mean_power_w: float
    energy_mj: float
    sm_clock_mhz: int
    of_roof: float


def measure_kernel(case: KernelCase, duration_s: float) -> MeasuredKernel:
    """Replay `case` until clock and power are steady, then for `duration_s`."""
    device_has = device_sms(torch.device("cuda"))
    stream = None
    if case.sms is not None:
        stream = lane_streams((("case", case.sms), ("rest", device_has - case.sms)))["case"]
    used = sustain([CapturedCalls(case.call, SETS, stream)], GpuMeter(), duration_s)
    call_s = used.call_s[0]
    allowed_s = max(case.bytes / READ_BYTES_PER_S, case.flop / FLOP_PER_S)
    return MeasuredKernel(
        case.name,
        round(call_s * 1e6, 2),
        round(case.bytes / call_s / 1e12, 3),
        round(case.bytes / call_s / 1e9 / (case.sms or device_has), 2),
        round(case.flop / call_s / 1e12, 1),
        round(used.power_w, 1),
        round(used.power_w * call_s * 1e3, 3),
        round(used.sm_clock_mhz),
        round(allowed_s / call_s, 3),
    )
