"""refine: time the best plans against sequential, in pairs, and keep a plan only if it is certain to win."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.predict import Timing

# Time a schedule in the sustained state.
Timer = Callable[[Schedule], Timing]

# Student's t at 0.975, by degrees of freedom.
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip


class Gain(NamedTuple):
    """How much faster one plan is than another: the geometric mean over rounds, and its 95 % interval."""

    mean: float
    low: float
    high: float


class Trial(NamedTuple):
    """A plan's prediction, made before it was timed, and what was measured."""

    schedule: Schedule
    predicted_us: float
    measured: Timing  # mean over its runs
    sequential: Timing  # likewise, of the runs around them
    over_sequential: Gain

    @property
    def measured_us(self) -> float:
        return self.measured.layer_us

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted_us / self.measured_us - 1


class Refined(NamedTuple):
    """`chosen` is sequential if no plan's interval lies above 1."""

    chosen: Schedule
    trials: tuple[Trial, ...]


def refine(timer: Timer, sequential: Schedule, plans: Sequence[tuple[Schedule, float]], rounds: int = 5) -> Refined:
    """Time each of `plans` (with its predicted microseconds) against `sequential`; the fastest that wins for certain.

    Raises:
        ValueError: fewer rounds than an interval needs, or more than anyone does.
    """
    if not 2 <= rounds <= len(STUDENT) + 1:
        raise ValueError(f"rounds: expected 2..{len(STUDENT) + 1}, for an interval; got {rounds}")
    trials = tuple(_trial(timer, sequential, schedule, predicted_us, rounds) for schedule, predicted_us in plans)
    winners = [trial for trial in trials if trial.over_sequential.low > 1]
    best = max(winners, key=lambda trial: trial.over_sequential.mean, default=None)
    return Refined(best.schedule if best else sequential, trials)


def _trial(timer: Timer, sequential: Schedule, schedule: Schedule, predicted_us: float, rounds: int) -> Trial:
    """Each round runs A B B A: a clock or a temperature that drifts steadily changes both by the same."""
    logs, bases, runs = [], [], []
    for _ in range(rounds):
        before, first, second, after = (timer(plan) for plan in (sequential, schedule, schedule, sequential))
        logs.append(math.log((before.layer_us + after.layer_us) / (first.layer_us + second.layer_us)))
        bases += [before, after]
        runs += [first, second]
    margin = STUDENT[rounds - 2] * stdev(logs) / math.sqrt(rounds)
    low, middle, high = (math.exp(mean(logs) + shift) for shift in (-margin, 0.0, margin))
    return Trial(schedule, predicted_us, _mean(runs), _mean(bases), Gain(middle, low, high))


def _mean(timings: Sequence[Timing]) -> Timing:
    return Timing(*(mean(values) for values in zip(*timings, strict=True)))
