"""Trials time the candidates against sequential in pairs, and keep a plan only if it is certain to win."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.checkpoint import Run
from nanoflow_search.emit.statistics import STUDENT, PlanTrials, Round
from nanoflow_search.predict.predict import Timer, Timing

Arm = TypeVar("Arm")  # what a timer times: a schedule, or more than that


class TrialResults(NamedTuple):
    """The trials of all plans; `chosen` is the number of the winner, None if sequential wins."""

    chosen: int | None
    trials: tuple[PlanTrials, ...]


def time_round(timer: Callable[[Arm], Timing], sequential: Arm, plans: Sequence[Arm]) -> tuple[Round, ...]:
    """Return one round for each of `plans`. They share the runs of sequential: A B C C B A."""
    before, first = timer(sequential), [timer(plan) for plan in plans]
    second, after = [timer(plan) for plan in reversed(plans)], timer(sequential)
    return tuple(Round(before, one, other, after) for one, other in zip(first, reversed(second), strict=True))


def run_trials(
    timers: Mapping[str, Timer],
    sequential: Schedule,
    plans: Sequence[Schedule],
    rounds: int = 5,
    run: Run = Run(),  # noqa: B008  it is frozen
) -> TrialResults:
    """Time each of `plans` against `sequential` on every workload, and choose the fastest that wins.

    `timers` has a timer for each workload. What the run's checkpoint holds is not timed again.

    Raises:
        ValueError: the rounds are too few for an interval, or more than the table of Student's t has.
    """
    if not 2 <= rounds <= len(STUDENT) + 1:
        raise ValueError(f"rounds: expected 2..{len(STUDENT) + 1}, for an interval; got {rounds}")
    trials = []
    for number, plan in enumerate(plans, 1):
        measured: dict[str, list[Round]] = {}
        for workload, timer in timers.items():
            measured[workload] = []
            for turn in range(rounds):
                name = f"plan-{number}-{workload.replace('/', '-')}-{turn}.json"
                if (found := run.checkpoint.load(name, Round)) is None:
                    found = run.checkpoint.save(name, time_round(timer, sequential, [plan])[0])
                measured[workload].append(found)
                run.advance()
        trials.append(PlanTrials.of(measured))
    winners = [number for number, found in enumerate(trials) if found.wins]
    return TrialResults(max(winners, key=lambda n: trials[n].gain.mean, default=None), tuple(trials))
