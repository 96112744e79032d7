"""walk: a schedule in time, on lanes that slow each other down: a fluid simulation, moment by moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Schedule, ScheduleError
from nanoflow_backend.schedule.validate import describe

NOTHING_US = 1e-9  # what is left of a launch that has ended, but for rounding


class Phase(NamedTuple):
    """A stretch of a launch that is alike throughout; attention has one for decodes and one for prompts."""

    curve: str  # its operation, as profiles have it
    amount: float
    sms: int | None
    alone_us: float


class Pace(NamedTuple):
    """What goes on while some phases run side by side."""

    slowdowns: tuple[float, ...]  # of each
    dynamic_w: float


class Walked(NamedTuple):
    total_us: float
    dynamic_j: float
    done: tuple[float, ...]  # by launch: how often its work was done
    spans_us: tuple[tuple[float, float], ...]  # by step of the unrolled schedule: from when to when it ran


def walk(
    schedule: Schedule, num_layers: int, phases: Sequence[Sequence[Phase]], pace: Callable[[tuple[Phase, ...]], Pace]
) -> Walked:
    """All layers, from first start to last end. `phases`: of each launch.

    A launch starts when the one before it in its lane and those that it waits for have ended.

    Raises:
        ScheduleError: launches that wait for each other.
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
    running: dict[str, tuple[int, int, float]] = {}  # lane -> step, number of its phase, what is left of that alone
    paces: dict[tuple[Phase, ...], Pace] = {}
    now_us = dynamic_j = 0.0
    done = [0.0] * len(launches)

    def start() -> bool:
        """Start what may start; did something without phases end?"""
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
    return Walked(now_us, dynamic_j, tuple(done), tuple(zip(starts_us, ends_us, strict=True)))
