"""Prediction: how long a schedule takes, at what clock and power, from a profile alone. It may be any schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.predict.simulate import Pace, Phase, Walked, walk
from nanoflow_search.predict.timing_model import Measured

CLOCK_MHZ = 2.0  # a settled clock is found to so much
LOWEST = 0.25  # of the highest clock: no cap that lets work be done at all pushes it lower


class Timing(NamedTuple):
    """Of one layer of a schedule, measured or predicted: a model's layers together, divided by their number."""

    layer_us: float
    clock_mhz: float
    power_w: float
    layer_j: float


def predict(schedule: Schedule, measured: Measured, num_layers: int) -> Timing:
    """At the highest clock at which the power cap lets static power and the plan's dynamic energy through.

    `schedule` is for batches of `measured.mix`. Each launch advances at the rate of its time alone, at that clock and
    with its SMs, over the slowdowns that were measured beside what runs in other lanes.

    Raises:
        ProfileError: an operation that was not measured.
    """
    header = measured.profile.header

    def timed(clock_mhz: float) -> Timing:
        walked = walk_at(schedule, measured.at(clock_mhz), num_layers)
        layer_us, layer_j = walked.total_us / num_layers, walked.dynamic_j / num_layers
        power_w = header.static_w + 1e6 * layer_j / layer_us
        return Timing(layer_us, clock_mhz, power_w, power_w * layer_us * 1e-6)

    highest = measured.profile.clocks_mhz[-1]
    found = settled(timed, LOWEST * highest, highest, header.power_cap_w)
    if found.power_w <= header.power_cap_w:
        return found
    # Energies that are not known to fall with the clock: time is what the cap takes.
    dynamic_j = found.layer_j - header.static_w * found.layer_us * 1e-6
    layer_us = 1e6 * dynamic_j / (header.power_cap_w - header.static_w)
    return Timing(layer_us, found.clock_mhz, header.power_cap_w, header.power_cap_w * layer_us * 1e-6)


def settled(timed: Callable[[float], Timing], low_mhz: float, high_mhz: float, power_cap_w: float) -> Timing:
    """The Timing at the highest clock within the cap, or at the lowest: a lower clock draws less power."""
    highest = timed(high_mhz)
    if highest.power_w <= power_cap_w:
        return highest
    while high_mhz - low_mhz > CLOCK_MHZ:
        middle = (low_mhz + high_mhz) / 2
        low_mhz, high_mhz = (low_mhz, middle) if timed(middle).power_w > power_cap_w else (middle, high_mhz)
    return timed(low_mhz)


def walk_at(schedule: Schedule, measured: Measured, num_layers: int) -> Walked:
    """At the clock of `measured`."""
    measured = measured.of_groups(schedule.groups)
    phases = [
        [
            Phase(curve, amount, sms, alone_us)
            for curve, amount in measured.loads((launch.operation,), launch.start, launch.stop)
            if (alone_us := measured.duration_us(curve, amount, sms)) > 0
        ]
        for launch in schedule.launches
        for sms in [schedule.sms(launch)]
    ]

    def pace(running: tuple[Phase, ...]) -> Pace:
        together = [(p.curve, p.sms) for p in running]
        slowdowns = measured.slowdowns(together)
        dynamic_w = sum(
            1e6 * measured.dynamic_j(p.curve, p.amount, p.sms) / (p.alone_us * slow)
            for p, slow in zip(running, slowdowns, strict=True)
        )
        return Pace(slowdowns, dynamic_w * measured.energy_ratio(together))

    return walk(schedule, num_layers, phases, pace)
