"""A fluid simulation runs a schedule in time, on lanes that slow each other down.

Between two events (a phase of a launch ends, so that others may start) all running phases advance at constant rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Schedule, ScheduleError
from nanoflow_backend.schedule.validate import describe

NOTHING_US = 1e-9  # a phase with less than this left has ended; the rest is rounding


class LaunchPhase(NamedTuple):
    """A part of a launch with constant demands; attention has one for decodes and one for prompts."""

    curve: str  # of the profile
    amount: float
    sms: int | None  # None: all, shared
    alone_us: float  # its time with nothing beside it


class Pace(NamedTuple):
    """How fast phases advance while they run side by side, and what they draw."""

    slowdowns: tuple[float, ...]  # of each phase
    dynamic_w: float  # of all, beyond static power


class SimulatedRun(NamedTuple):
    """What a simulation of all layers has found."""

    total_us: float
    dynamic_j: float
    done: tuple[float, ...]  # for each launch of the schedule: how often its work was done, over all layers
    spans_us: tuple[tuple[float, float], ...]  # for each step of the unrolled schedule: when it started and ended


def simulate_launches(
    schedule: Schedule,
    num_layers: int,
    phases: Sequence[Sequence[LaunchPhase]],
    pace: Callable[[tuple[LaunchPhase, ...]], Pace],
) -> SimulatedRun:
    """Simulate all layers, from the first start to the last end.

    A launch starts when the one before it in its lane, and those that it waits for, have ended. `phases` are those of
    each launch, in their order; `pace` says how fast phases advance side by side.

    Raises:
        ScheduleError: launches wait for each other.
    """
    steps = schedule.unroll(num_layers)
    index = {step: k for k, step in enumerate(steps)}
    launches = schedule.launches
    waits = [
        [index[layer - wait.layers_back, wait.launch] for wait in launches[n].waits if wait.layers_back <= layer]
        for layer, n in steps
    ]
    queues: dict[str, list[int]] = {lane: [] for lane in schedule.lanes}
    for k, (_, n) in reversed(list(enumerate(steps))):
        queues[launches[n].lane].append(k)
    ended = [False] * len(steps)
    starts_us, ends_us = [0.0] * len(steps), [0.0] * len(steps)
    running: dict[str, tuple[int, int, float]] = {}  # lane -> (step, number of its phase, time left of that alone)
    paces: dict[tuple[LaunchPhase, ...], Pace] = {}
    now_us = dynamic_j = 0.0
    done = [0.0] * len(launches)

    def start() -> bool:
        """Start every launch that may start; return whether one without phases has ended at once."""
        again = False
        for lane, queue in queues.items():
            if lane in running or not queue or not all(ended[k] for k in waits[queue[-1]]):
                continue
            step = queue.pop()
            starts_us[step] = ends_us[step] = now_us
            if phases[steps[step][1]]:
                running[lane] = (step, 0, phases[steps[step][1]][0].alone_us)
            else:
                ended[step] = again = True
        return again

    while True:
        while start():
            pass
        if not running:
            break
        current = tuple(phases[steps[step][1]][number] for step, number, _ in running.values())
        if current not in paces:
            paces[current] = pace(current)
        slowdowns, dynamic_w = paces[current]
        took_us = min(left * slow for (_, _, left), slow in zip(running.values(), slowdowns, strict=True))
        now_us += took_us
        dynamic_j += dynamic_w * took_us * 1e-6
        for (lane, (step, number, left)), slow in zip(list(running.items()), slowdowns, strict=True):
            launch = steps[step][1]
            left -= took_us / slow
            done[launch] += took_us / slow / phases[launch][number].alone_us / len(phases[launch])
            if left > NOTHING_US:
                running[lane] = (step, number, left)
            elif number + 1 < len(phases[launch]):
                running[lane] = (step, number + 1, phases[launch][number + 1].alone_us)
            else:
                ended[step], ends_us[step] = True, now_us
                del running[lane]
    if not all(ended):
        _, number = steps[ended.index(False)]
        raise ScheduleError(f"{describe(number, launches[number])} waits for what never ends")
    return SimulatedRun(now_us, dynamic_j, tuple(done), tuple(zip(starts_us, ends_us, strict=True)))
