"""Sustained measurement runs work back to back for seconds, as in a loaded engine, until clock and power are steady.

Work is queued ahead in bursts, so that the device never waits for the host.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean
from typing import NamedTuple

from nanoflow_backend.runtime.gpu_meter import GpuReading
from nanoflow_search.hardware.interface import Burst, PowerMeter, RepeatedWork

WARM_UP_S = 0.7
BURST_S = 0.03  # the aim for a burst's time: the power cap averages over longer
AHEAD = 3  # bursts that are queued at once
POLL_S = 0.002
POWER_DOWN_S = 0.2  # until the power of the work before has faded


class SustainedUse(NamedTuple):
    """What was measured of work that runs in the sustained state."""

    call_s: tuple[float, ...]  # of one call of each work
    power_w: float  # mean over all of the time
    sm_clock_mhz: float  # mean of readings while work ran
    busy: float  # share of that time in which the first work ran


def sustain(
    works: Sequence[RepeatedWork],
    meter: PowerMeter,
    seconds: float,
    *,
    warm_s: float = WARM_UP_S,
    busy: float = 1.0,
    rest: RepeatedWork | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> SustainedUse:
    """Run `works` side by side for `warm_s` seconds, then measure them for `seconds`.

    A single work may take turns, burst by burst, with `rest`. Or it may leave the device idle between its bursts, so
    that it is `busy` for a share of the time.
    """
    run = _SustainedRun(works, meter, seconds, warm_s, sleep)
    if busy < 1 and rest is None:
        run.with_pauses(busy)
    else:
        run.back_to_back(rest)
    return run.used()


def idle_w(meter: PowerMeter, seconds: float, *, sleep: Callable[[float], None] = time.sleep) -> float:
    """Return the power of a device that has nothing to do, its clock still up, as in a pause between bursts."""
    sleep(POWER_DOWN_S)
    readings = [meter.read()]
    while readings[-1].time_s - readings[0].time_s < seconds:
        sleep(POLL_S)
        readings.append(meter.read())
    first, last = _between_ticks(readings)
    return (last.energy_j - first.energy_j) / (last.time_s - first.time_s)


def _between_ticks(readings: Sequence[GpuReading]) -> tuple[GpuReading, GpuReading]:
    """Return the first and the last reading at which the energy counter had just moved; it moves every few dozen ms."""
    moved = [b for a, b in pairwise(readings) if b.energy_j != a.energy_j]
    return (moved[0], moved[-1]) if len(moved) > 1 else (readings[0], readings[-1])


class _SustainedRun:
    """One measurement: bursts are launched, readings collected, and both evaluated by `used`."""

    def __init__(
        self,
        works: Sequence[RepeatedWork],
        meter: PowerMeter,
        seconds: float,
        warm_s: float,
        sleep: Callable[[float], None],
    ) -> None:
        self._works, self._meter, self._sleep = works, meter, sleep
        self._start_s = meter.read().time_s + warm_s
        self._stop_s = self._start_s + seconds
        self._readings: list[GpuReading] = []
        self._clocks: list[int] = []
        self._took_s: list[list[float]] = [[] for _ in works]
        self._busy: list[tuple[float, float]] = []  # (begin, end) of the first work's bursts
        self._rest_s = 0.0

    def back_to_back(self, rest: RepeatedWork | None) -> None:
        """Keep a queue of bursts for each work; `rest` takes turns with the first."""
        turns = [[(number, work)] for number, work in enumerate(self._works)]
        if rest:
            turns[0].append((-1, rest))
        queues: list[deque[tuple[int, Burst]]] = [deque() for _ in turns]
        launched = [0] * len(turns)

        def launch(lane: int) -> None:
            number, work = turns[lane][launched[lane] % len(turns[lane])]
            before = queues[lane][-1][1] if queues[lane] and rest else None
            queues[lane].append((number, work.launch(before)))
            launched[lane] += 1

        for lane in range(len(turns)):
            for _ in range(AHEAD):
                launch(lane)
        while self._read(busy=True):
            for lane, queue in enumerate(queues):
                while queue[0][1].ended():
                    self._count(*queue.popleft())
                    launch(lane)
            self._sleep(POLL_S)
        for queue in queues:
            for _, burst in queue:
                burst.took_s()

    def with_pauses(self, busy: float) -> None:
        """Run bursts of the only work, each followed by a pause that leaves it `busy` for that share of the time."""
        going = True
        while going:
            burst, begun_s = self._works[0].launch(), self._meter.read().time_s
            while not burst.ended():
                going = self._read(busy=True)
                self._sleep(POLL_S)
            took_s = burst.took_s()
            self._count(0, burst)
            self._busy.append((begun_s, begun_s + took_s))
            self._sleep(took_s * (1 - busy) / busy)
            going = self._read(busy=False)

    def used(self) -> SustainedUse:
        """Return means over the time between the first and the last tick of the energy counter."""
        first, last = _between_ticks(self._readings)
        over_s = last.time_s - first.time_s
        if self._busy:
            busy_s = sum(max(0.0, min(b, last.time_s) - max(a, first.time_s)) for a, b in self._busy)
            share = busy_s / over_s
        else:
            worked_s = sum(self._took_s[0])
            share = worked_s / (worked_s + self._rest_s)
        return SustainedUse(
            tuple(sum(took) / (len(took) * work.calls) for took, work in zip(self._took_s, self._works, strict=True)),
            (last.energy_j - first.energy_j) / over_s,
            mean(self._clocks),
            share,
        )

    def _read(self, busy: bool) -> bool:
        """Take a reading, and return whether there is time left."""
        reading = self._meter.read()
        if reading.time_s >= self._start_s:
            self._readings.append(reading)
            if busy:
                self._clocks.append(reading.sm_clock_mhz)
        # However long bursts take, at least one of each work must lie in the measured time.
        return reading.time_s < self._stop_s or not all(self._took_s)

    def _count(self, number: int, burst: Burst) -> None:
        if not self._readings:
            return
        if number < 0:
            self._rest_s += burst.took_s()
        else:
            self._took_s[number].append(burst.took_s())
