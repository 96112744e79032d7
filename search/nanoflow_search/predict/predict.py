"""A prediction says how long any schedule takes, and at what clock and power, from a profile alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.predict.simulate import LaunchPhase, Pace, SimulatedRun, simulate_launches
from nanoflow_search.predict.timing_model import TimingModel

CLOCK_RESOLUTION_MHZ = 2.0  # to which the clock under a power cap is found
LOWEST_CLOCK_SHARE = 0.25  # of the highest clock: no power cap pushes a working device lower


class Timing(NamedTuple):
    """What one layer of a schedule takes, measured or predicted: all layers together, divided by their number."""

    layer_us: float
    clock_mhz: float
    power_w: float  # mean, of the whole device
    layer_j: float  # of the whole device, static power included


Timer = Callable[[Schedule], Timing]  # measures one layer of a schedule in the sustained state


def predict(schedule: Schedule, model: TimingModel, num_layers: int) -> Timing:
    """Predict a schedule for batches of `model.mix`, at the highest clock that the power cap allows.

    The clock is the highest at which static power and the plan's dynamic energy stay within the cap. A launch's rate
    follows from its time alone at that clock on its SMs, and from the slowdowns beside what runs in other lanes.

    Raises:
        ProfileError: an operation was not measured.
    """
    header = model.profile.header

    def timed(clock_mhz: float) -> Timing:
        run = simulate_at(schedule, model.at(clock_mhz), num_layers)
        layer_us, layer_j = run.total_us / num_layers, run.dynamic_j / num_layers
        power_w = header.static_w + 1e6 * layer_j / layer_us
        return Timing(layer_us, clock_mhz, power_w, power_w * layer_us * 1e-6)

    highest = model.profile.clocks_mhz[-1]
    found = highest_clock_within_cap(timed, LOWEST_CLOCK_SHARE * highest, highest, header.power_cap_w)
    if found.power_w <= header.power_cap_w:
        return found
    # The energies are not known to fall with the clock: the cap stretches the time instead.
    dynamic_j = found.layer_j - header.static_w * found.layer_us * 1e-6
    layer_us = 1e6 * dynamic_j / (header.power_cap_w - header.static_w)
    return Timing(layer_us, found.clock_mhz, header.power_cap_w, header.power_cap_w * layer_us * 1e-6)


def highest_clock_within_cap(
    timed: Callable[[float], Timing], low_mhz: float, high_mhz: float, power_cap_w: float
) -> Timing:
    """Return the timing at the highest clock whose power is within the cap, or at the lowest clock if none is.

    `timed` gives the timing at a clock. A lower clock draws less power, so that bisection finds it.
    """
    highest = timed(high_mhz)
    if highest.power_w <= power_cap_w:
        return highest
    while high_mhz - low_mhz > CLOCK_RESOLUTION_MHZ:
        middle = (low_mhz + high_mhz) / 2
        low_mhz, high_mhz = (low_mhz, middle) if timed(middle).power_w > power_cap_w else (middle, high_mhz)
    return timed(low_mhz)


def simulate_at(schedule: Schedule, model: TimingModel, num_layers: int) -> SimulatedRun:
    """Simulate a schedule for batches of `model.mix` at the clock of `model`, whatever power it draws."""
    model = model.with_groups(schedule.groups)
    phases = [
        [
            LaunchPhase(curve, amount, sms, alone_us)
            for curve, amount in model.loads((launch.operation,), launch.start, launch.stop)
            if (alone_us := model.duration_us(curve, amount, sms)) > 0
        ]
        for launch in schedule.launches
        for sms in [schedule.sms(launch)]
    ]

    def pace(running: tuple[LaunchPhase, ...]) -> Pace:
        together = [(p.curve, p.sms) for p in running]
        slowdowns = model.slowdowns(together)
        dynamic_w = sum(
            1e6 * model.dynamic_j(p.curve, p.amount, p.sms) / (p.alone_us * slow)
            for p, slow in zip(running, slowdowns, strict=True)
        )
        return Pace(slowdowns, dynamic_w * model.energy_ratio(together))

    return simulate_launches(schedule, num_layers, phases, pace)
