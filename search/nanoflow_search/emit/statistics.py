"""The statistics of a trial give a plan's gain over sequential with an interval, from rounds of A B B A."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from nanoflow_search.predict.predict import Timing

# Student's t at 0.975, by degrees of freedom from 1: a table, since there may be no scipy where a GPU is.
STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip


class Round(NamedTuple):
    """One round, A B B A: a clock or a temperature that drifts steadily changes both plans by the same."""

    before: Timing  # of sequential
    first: Timing
    second: Timing
    after: Timing  # of sequential

    @property
    def log_gain(self) -> float:
        """The logarithm of how much faster the plan is than sequential."""
        return math.log((self.before.layer_us + self.after.layer_us) / (self.first.layer_us + self.second.layer_us))


class Gain(NamedTuple):
    """How much faster one plan is than another: the geometric mean over rounds, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, logs: Sequence[float]) -> Gain:
        """Return the gain from the `log_gain` of two or more rounds, by Student's t."""
        margin = STUDENT[len(logs) - 2] * stdev(logs) / math.sqrt(len(logs))
        return cls(*(math.exp(mean(logs) + shift) for shift in (0.0, -margin, margin)))


class PlanTrial(NamedTuple):
    """What was measured of one plan on one workload."""

    timing: Timing  # mean over the plan's runs
    sequential: Timing  # mean over the runs of sequential beside them
    gain: Gain  # over sequential

    @classmethod
    def of(cls, rounds: Sequence[Round]) -> PlanTrial:
        """Return the trial of two or more rounds."""
        return cls(
            mean_timing([run for r in rounds for run in (r.first, r.second)]),
            mean_timing([run for r in rounds for run in (r.before, r.after)]),
            Gain.of([r.log_gain for r in rounds]),
        )


class PlanTrials(NamedTuple):
    """The trials of one plan on all workloads."""

    by_workload: Mapping[str, PlanTrial]
    gain: Gain  # over all workloads

    @classmethod
    def of(cls, rounds: Mapping[str, Sequence[Round]]) -> PlanTrials:
        """Return the trials of as many rounds on each workload."""
        by_workload = {workload: PlanTrial.of(of_one) for workload, of_one in rounds.items()}
        turns = zip(*rounds.values(), strict=True)
        return cls(by_workload, Gain.of([mean(r.log_gain for r in turn) for turn in turns]))

    @property
    def wins(self) -> bool:
        """Whether the plan is certainly faster than sequential over all workloads, and on none certainly slower."""
        return self.gain.low > 1 and all(trial.gain.high >= 1 for trial in self.by_workload.values())


def mean_timing(runs: Sequence[Timing]) -> Timing:
    """Return the mean of every quantity."""
    return Timing(*(mean(column) for column in zip(*runs, strict=True)))
