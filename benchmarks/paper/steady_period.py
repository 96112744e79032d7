"""The steady period of lanes that repeat their work for ever, by the rules of `simulate_launches`.

The simulation knows neither layers nor the ends of a model, so that a search can afford it for every plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

from nanoflow_search.predict.simulate import NOTHING_US
from nanoflow_search.predict.timing_model import RunningCurve

PERIODS = 12  # a plan that has not settled by then is given up; most settle after three or four
ALIKE_US = 1e-6  # two periods that differ by less are the same


class Stint(NamedTuple):
    """What a lane does once in each period."""

    lane: int
    phases: tuple[tuple[RunningCurve, float], ...]  # one or more, with the time alone
    needs: Sequence[tuple[int, int]]  # (number of a stint, periods back) that must have ended


class Cycle(NamedTuple):
    """A steady period."""

    period_us: float
    spans_us: tuple[tuple[float, float], ...]  # of each stint, in the same period of all


def settled(stints: Sequence[Stint], paces: Mapping[tuple[RunningCurve | None, ...], Sequence[float]]) -> Cycle | None:
    """Return the period that comes back again and again; None, if none does, or if stints wait for each other.

    Lanes are numbered from 0, and each lane's stints are in their order. Stints of periods before the first have ended.
    `paces` maps what runs in each lane to how much longer it takes.
    """
    orders: list[list[int]] = [[] for _ in range(1 + max(stint.lane for stint in stints))]
    for number, stint in enumerate(stints):
        orders[stint.lane].append(number)
    phases, needs = [stint.phases for stint in stints], [stint.needs for stint in stints]
    lanes = range(len(orders))
    at, period = [0] * len(orders), [0] * len(orders)  # what is next, or runs
    running: list[RunningCurve | None] = [None] * len(orders)
    phase, left_us = [0] * len(orders), [math.inf] * len(orders)  # its number, and what is left of it alone
    ended = [-1] * len(stints)  # in which period last
    begins_us, ends_us = [0.0] * len(stints), [0.0] * len(stints)
    now_us = marked_us = 0.0
    marked: list[float] = []  # all that decides what comes, when lane 0 had last done its stints

    while period[0] < PERIODS:
        for lane in lanes:
            if running[lane] is None:
                number = orders[lane][at[lane]]
                for writer, back in needs[number]:
                    if ended[writer] < period[lane] - back:
                        break
                else:
                    phase[lane], begins_us[number] = 0, now_us
                    running[lane], left_us[lane] = phases[number][0]
        slower = paces[tuple(running)]
        took_us = min(map(mul, left_us, slower))
        if took_us == math.inf:
            return None
        now_us += took_us
        turned = False
        for lane in lanes:
            left_us[lane] -= took_us / slower[lane]
            if left_us[lane] > NOTHING_US:
                continue
            number = orders[lane][at[lane]]
            phase[lane] += 1
            if phase[lane] < len(phases[number]):
                running[lane], left_us[lane] = phases[number][phase[lane]]
                continue
            running[lane], left_us[lane], ended[number], ends_us[number] = None, math.inf, period[lane], now_us
            at[lane] += 1
            if at[lane] == len(orders[lane]):
                at[lane], period[lane] = 0, period[lane] + 1
                turned = turned or lane == 0
        if turned:
            mark = [*at, *phase, *(here - period[0] for here in period), *left_us]
            if marked and all(a == b or abs(a - b) < ALIKE_US for a, b in zip(mark, marked, strict=True)):
                return _cycle(now_us - marked_us, ended, begins_us, ends_us)
            marked, marked_us = mark, now_us
    return None


def _cycle(period_us: float, ended: list[int], begins_us: list[float], ends_us: list[float]) -> Cycle:
    """Return the period with each stint's last end, and the start before it, shifted to period 0."""
    spans_us = []
    for last, begin_us, end_us in zip(ended, begins_us, ends_us, strict=True):
        started_us = begin_us if begin_us < end_us else begin_us - period_us  # it runs again
        spans_us.append((started_us - last * period_us, end_us - last * period_us))
    return Cycle(period_us, tuple(spans_us))
