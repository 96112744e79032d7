"""cycle: the steady period of lanes that repeat their work for ever, by the rules of `walk`: a fluid simulation.

It knows neither layers nor the ends of a model, so that a search can afford it for each plan that it looks at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import mul
from typing import NamedTuple

from nanoflow_search.predict.simulate import NOTHING_US
from nanoflow_search.predict.timing_model import Running

PERIODS = 12  # what has not settled by then is no plan; most have after three or four
ALIKE_US = 1e-6  # to which two periods must agree


class Stint(NamedTuple):
    """What a lane does once in each period."""

    lane: int
    phases: tuple[tuple[Running, float], ...]  # one or more, with the time alone
    needs: Sequence[tuple[int, int]]  # (number of a stint, periods back) that must have ended


class Cycle(NamedTuple):
    period_us: float
    spans_us: tuple[tuple[float, float], ...]  # of each stint, in the same period of all


def settled(stints: Sequence[Stint], paces: Mapping[tuple[Running | None, ...], Sequence[float]]) -> Cycle | None:
    """What comes back period after period; None, if nothing does, or if stints wait for each other.

    Lanes are numbered from 0; their stints are in their order. Those of all periods before the first have ended.
    `paces`: what runs in each lane -> how much longer it takes.
    """
    orders: list[list[int]] = [[] for _ in range(1 + max(stint.lane for stint in stints))]
    for number, stint in enumerate(stints):
        orders[stint.lane].append(number)
    phases, needs = [stint.phases for stint in stints], [stint.needs for stint in stints]
    lanes = range(len(orders))
    at, period = [0] * len(orders), [0] * len(orders)  # what is next, or runs
    running: list[Running | None] = [None] * len(orders)
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
    """Each stint's last end, and the start before it, as if it were in period 0."""
    spans_us = []
    for last, begin_us, end_us in zip(ended, begins_us, ends_us, strict=True):
        started_us = begin_us if begin_us < end_us else begin_us - period_us  # it runs again
        spans_us.append((started_us - last * period_us, end_us - last * period_us))
    return Cycle(period_us, tuple(spans_us))
