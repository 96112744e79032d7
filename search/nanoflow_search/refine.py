"""refine: time the best plans against sequential, in pairs, and keep a plan only if it is certain to win."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t as student

from nanoflow_backend.schedule.plan import Schedule

# Time one layer of a schedule, in the sustained state, in microseconds.
Timer = Callable[[Schedule], float]


class Gain(NamedTuple):
    """How much faster one plan is than another: the geometric mean over rounds, and its 95 % interval."""

    mean: float
    low: float
    high: float


class Trial(NamedTuple):
    """A plan's prediction, made before it was timed, and what was measured."""

    schedule: Schedule
    predicted_us: float
    measured_us: float  # mean over its runs
    over_sequential: Gain

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
        ValueError: fewer rounds than an interval needs.
    """
    if rounds < 2:
        raise ValueError(f"rounds: expected at least 2, for an interval; got {rounds}")
    trials = tuple(_trial(timer, sequential, schedule, predicted_us, rounds) for schedule, predicted_us in plans)
    winners = [trial for trial in trials if trial.over_sequential.low > 1]
    best = max(winners, key=lambda trial: trial.over_sequential.mean, default=None)
    return Refined(best.schedule if best else sequential, trials)


def _trial(timer: Timer, sequential: Schedule, schedule: Schedule, predicted_us: float, rounds: int) -> Trial:
    """Each round runs A B B A: a clock or a temperature that drifts steadily changes both by the same."""
    logs, runs = [], []
    for _ in range(rounds):
        before, first, second, after = (timer(plan) for plan in (sequential, schedule, schedule, sequential))
        logs.append(math.log((before + after) / (first + second)))
        runs += [first, second]
    margin = float(student.ppf(0.975, rounds - 1)) * stdev(logs) / math.sqrt(rounds)
    low, middle, high = (math.exp(mean(logs) + shift) for shift in (-margin, 0.0, margin))
    return Trial(schedule, predicted_us, mean(runs), Gain(middle, low, high))
