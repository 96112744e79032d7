"""refine: time the best plans against sequential, in pairs, and keep a plan only if it is certain to win."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.checkpoint import Once, always
from nanoflow_search.predict.predict import Timing

# Student's t at 0.975, by degrees of freedom: a table, since there may be no scipy where a GPU is.
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip

Timer = Callable[[Schedule], Timing]  # of one layer, in the sustained state


class Round(NamedTuple):
    """A B B A: a clock or a temperature that drifts steadily changes both plans by the same."""

    before: Timing  # of sequential
    first: Timing
    second: Timing
    after: Timing  # of sequential

    @property
    def log_gain(self) -> float:
        return math.log((self.before.layer_us + self.after.layer_us) / (self.first.layer_us + self.second.layer_us))


class Gain(NamedTuple):
    """How much faster one plan is than another: the geometric mean over rounds, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, logs: Sequence[float]) -> Gain:
        margin = STUDENT[len(logs) - 2] * stdev(logs) / math.sqrt(len(logs))
        return cls(*(math.exp(mean(logs) + shift) for shift in (0.0, -margin, margin)))


def time_round(timer: Timer, sequential: Schedule, plans: Sequence[Schedule]) -> tuple[Round, ...]:
    """Of each of `plans`. They share the runs of sequential: A B C C B A."""
    before, first = timer(sequential), [timer(plan) for plan in plans]
    second, after = [timer(plan) for plan in reversed(plans)], timer(sequential)
    return tuple(Round(before, one, other, after) for one, other in zip(first, reversed(second), strict=True))


class Trial(NamedTuple):
    """What was measured of a plan on one workload."""

    timing: Timing  # mean over its runs
    sequential: Timing  # mean over those beside them
    gain: Gain  # over sequential

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> Trial:
        return cls(
            mean_timing([run for r in rounds for run in (r.first, r.second)]),
            mean_timing([run for r in rounds for run in (r.before, r.after)]),
            Gain.of([r.log_gain for r in rounds]),
        )


class Trials(NamedTuple):
    """Of one plan, by workload; and over all of them."""

    by_workload: Mapping[str, Trial]
    gain: Gain

    @property
    def wins(self) -> bool:
        """Faster for certain, and on no workload certainly slower."""
        return self.gain.low > 1 and all(trial.gain.high >= 1 for trial in self.by_workload.values())


class Refined(NamedTuple):
    """`chosen` is the number of a plan; None: sequential, since no plan wins."""

    chosen: int | None
    trials: tuple[Trials, ...]


def refine(
    timers: Mapping[str, Timer],
    sequential: Schedule,
    plans: Sequence[Schedule],
    rounds: int = 5,
    once: Once = always,
    progress: Callable[[], None] = lambda: None,
) -> Refined:
    """Time each of `plans` against `sequential` on every workload (`timers`, by name); the fastest that wins.

    Raises:
        ValueError: fewer rounds than an interval needs, or more than anyone does.
    """
    if not 2 <= rounds <= len(STUDENT) + 1:
        raise ValueError(f"rounds: expected 2..{len(STUDENT) + 1}, for an interval; got {rounds}")
    trials = []
    for number, plan in enumerate(plans, 1):
        measured: dict[str, list[Round]] = {}
        for workload, timer in timers.items():

            def time_once(timer: Timer = timer, plan: Schedule = plan) -> Round:
                return time_round(timer, sequential, [plan])[0]

            measured[workload] = []
            for turn in range(rounds):
                name = f"plan-{number}-{workload.replace('/', '-')}-{turn}.json"
                measured[workload].append(once(name, Round, time_once))
                progress()
        trials.append(_trials(measured))
    winners = [number for number, found in enumerate(trials) if found.wins]
    return Refined(max(winners, key=lambda n: trials[n].gain.mean, default=None), tuple(trials))


def _trials(measured: Mapping[str, Sequence[Round]]) -> Trials:
    by_workload = {workload: Trial.of(rounds) for workload, rounds in measured.items()}
    turns = zip(*measured.values(), strict=True)
    return Trials(by_workload, Gain.of([mean(r.log_gain for r in turn) for turn in turns]))


def mean_timing(runs: Sequence[Timing]) -> Timing:
    return Timing(*(mean(column) for column in zip(*runs, strict=True)))
