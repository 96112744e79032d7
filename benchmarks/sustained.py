"""A kernel back to back for seconds, as it runs in a loaded engine: clock and power are steady before time is taken.

A case is captured in a CUDA graph of calls that take turns with several sets of operands, so that none finds its inputs
in the cache; the graph is replayed until clock and power are steady, then for the time that is measured. Energy is the
device's energy counter over that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nanoflow_backend.runtime.gpu_meter import GpuMeter

READ_BYTES_PER_S = 4.57e12  # one H200, bulk copies of tiles without arithmetic
FLOP_PER_S = 672e12  # one H200, cuBLAS bf16 on random data in the sustained state (its clock falls under the power cap)
SETS = 4  # of operands that take turns
CALLS = 32  # a graph: launching it must not take longer than running it
WARM_S = 0.7
BURST_S = 0.03  # replays that are queued at once


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[int], Any]  # with the number of its set of operands
    bytes: float  # that it must move
    flop: float = 0.0


@dataclass(frozen=True)
class Measured:
    """Of one call. `of_roof`: the time that the roofs above allow over the time taken."""

    name: str
    duration_us: float
    tb_per_s: float
    tflop_per_s: float
    mean_power_w: float
    energy_mj: float
    sm_clock_mhz: int
    of_roof: float


def measure(case: Case, seconds: float) -> Measured:
    run = Run(case)
    run.go(WARM_S)
    used = run.go(seconds)
    call_s = used.busy_s / used.calls
    allowed_s = max(case.bytes / READ_BYTES_PER_S, case.flop / FLOP_PER_S)
    return Measured(
        case.name,
        round(call_s * 1e6, 2),
        round(case.bytes / call_s / 1e12, 3),
        round(case.flop / call_s / 1e12, 1),
        round(used.energy_j / used.wall_s, 1),
        round(used.energy_j * 1e3 / used.calls, 3),
        used.sm_clock_mhz,
        round(allowed_s / call_s, 3),
    )


@dataclass(frozen=True)
class Used:
    calls: int
    wall_s: float
    busy_s: float
    energy_j: float
    sm_clock_mhz: int  # mean of readings while busy


class Run:
    """A captured case, to be replayed for a while. The device waits `idle_share` of the wall time between bursts."""

    def __init__(self, case: Case, idle_share: float = 0.0) -> None:
        self._meter, self._idle_share = GpuMeter(), idle_share
        for i in range(SETS):
            case.call(i)  # compiles
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for i in range(CALLS):
                case.call(i % SETS)
        self._replays = 1
        self._replays = max(1, round(BURST_S / self._wait(self._burst(), [])))

    def go(self, seconds: float) -> Used:
        clocks: list[int] = []
        before, busy_s, bursts = self._meter.read(), 0.0, 0
        ahead = None if self._idle_share else self._burst()
        while time.perf_counter() - before.time_s < seconds:
            burst = self._burst()  # without idle time it is queued while the one before runs
            if ahead is None:
                took_s = self._wait(burst, clocks)
                time.sleep(took_s * self._idle_share / (1 - self._idle_share))
            else:
                took_s, ahead = self._wait(ahead, clocks), burst
            busy_s, bursts = busy_s + took_s, bursts + 1
        after = self._meter.read()
        if ahead is not None:
            self._wait(ahead, [])
        wall_s, energy_j = after.time_s - before.time_s, after.energy_j - before.energy_j
        return Used(bursts * self._replays * CALLS, wall_s, busy_s, energy_j, round(sum(clocks) / len(clocks)))

    def _burst(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        return begin, end

    def _wait(self, burst: tuple[torch.cuda.Event, torch.cuda.Event], clocks: list[int]) -> float:
        """Seconds that the burst took, and the clock in its middle."""
        begin, end = burst
        begin.synchronize()
        time.sleep(BURST_S / 2)
        clocks.append(self._meter.read().sm_clock_mhz)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
