"""A search turns a model and a machine into a schedule file, in phases that can each be cut and go on from their files.

1. profile: operations are measured alone and side by side, on the machine.
2. plans: the two stages plan for each size of batch, and the best plans are predicted; this needs a solver only.
3. timing: those plans are timed against sequential, on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nanoflow_backend.config.network_table import NetworkTable
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_search.checkpoint import Checkpoint, Run, SearchError
from nanoflow_search.emit.progress import ProgressDisplay
from nanoflow_search.emit.schedule_file import Outcome, Planned, make_predicted_file, make_schedule_file
from nanoflow_search.emit.trials import run_trials
from nanoflow_search.hardware.interface import Machine
from nanoflow_search.hardware.machine import measure_profile
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.plan.candidates import Candidate, PlanPrediction, find_candidates, predictions_of
from nanoflow_search.predict.predict import Timer
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.network import with_network
from nanoflow_search.request import Effort, Phase, SearchRequest


class Found(NamedTuple):
    """What a search has found."""

    file: ScheduleFile
    best: Outcome | None  # at B_dense; None: nothing was timed
    planned: list[Planned]  # of each size, ascending
    profile: Profile


def search(
    request: SearchRequest,
    sizes: tuple[int, ...],
    effort: Effort,
    machine: Machine | None,
    profile_path: Path,
    checkpoint: Checkpoint,
    display: ProgressDisplay,
    until: Phase = Phase.TIMING,
    network: Sequence[NetworkTable] = (),
) -> Found | None:
    """Return what was found; None if an earlier phase is the last one wanted.

    Where tables of the `network` stand in for collectives, nothing can be timed: the file has the plans that are
    predicted to win.

    `sizes` of batches are ascending tokens; none: those that suit the workloads and the device's memory. `machine` is
    None where nothing can be measured: what the profile and the checkpoint lack must be measured elsewhere.

    Raises:
        SearchError: something is to be measured and here is no machine, or the checkpoint is that of another search.
        ProfileError: the profile is of something else.
    """
    run = Run(checkpoint, display.say, display.advance)
    profile = _profile(request, sizes, effort, machine, profile_path, run, display, network)
    if until is Phase.PROFILE:
        return None
    sizes = sizes or request.sizes(profile.header.device)
    if network:
        mix = request.mix(request.workloads[0], max(sizes), profile.header.device)
        profile = with_network(profile, request.operations, network, mix, sizes)
    checkpoint.claim(request.key(profile, sizes, effort))
    display.begin("plans", len(sizes))
    planned = [_plan(BatchCase(request, profile, tokens), effort, run.within(str(tokens))) for tokens in sizes]
    if until is Phase.PLANS:
        return None
    if network:
        return Found(make_predicted_file(planned), None, planned, profile)
    trials = len(request.workloads) * sum(len(found.plans) - 1 for found in planned)
    display.begin("timing", effort.rounds * trials)
    timed = [_time(found, effort, machine, run.within(str(found.case.tokens))) for found in planned]
    return Found(*make_schedule_file(timed), planned, profile)


def _profile(
    request: SearchRequest,
    sizes: tuple[int, ...],
    effort: Effort,
    machine: Machine | None,
    path: Path,
    run: Run,
    display: ProgressDisplay,
    network: Sequence[NetworkTable],
) -> Profile:
    """Return the profile, measured as far as it lacks points. Once plans were made from it, it stays as it is.

    Raises:
        SearchError: there is none and no machine, or it was taken of another layer, precision or number of ranks.
    """
    if machine is not None and not run.checkpoint.claimed:
        display.begin("profile", None)
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_profile(machine, request, sizes or request.sizes(machine.name), effort.shared, path, run.say, network)
    if not path.exists():
        raise SearchError(f"{path}: there is no profile, and no GPU here: take it where one is (--until profile)")
    profile = Profile.load(path)
    if mismatch := profile.header.mismatch(request.model.layer, request.precision, request.ranks):
        raise SearchError(f"{path}: {mismatch}")
    return profile


def _plan(case: BatchCase, effort: Effort, run: Run) -> Planned:
    """Return the candidates of one size with their predictions, which are on file before anything is timed."""
    files = run.checkpoint
    if (plans := files.load("plans.msgpack", list[Candidate])) is None:
        plans = files.save("plans.msgpack", find_candidates(case, effort, run))
    if (predictions := files.load("predictions.json", list[PlanPrediction])) is None:
        predictions = files.save("predictions.json", predictions_of(case, plans))
    if (bounds_us := files.load("bounds.json", dict[str, float])) is None:
        bounds_us = files.save("bounds.json", case.bounds_us())
    run.advance()
    return Planned(case, plans, predictions, bounds_us)


def _time(planned: Planned, effort: Effort, machine: Machine | None, run: Run) -> Outcome:
    """Return the outcome of the trials of one size."""
    case = planned.case

    def timer(workload: str) -> Timer:
        @cache
        def made() -> Timer:
            """Make the timer at its first use, since it takes memory for weights and pages."""
            if machine is None:
                raise SearchError("the plans are found; run the same command where a GPU is to time them")
            return machine.timer(case.request, case.mix(workload))

        return lambda schedule: made()(schedule)

    sequential, *others = (plan.schedule for plan in planned.plans)
    timers = {workload: timer(workload) for workload in case.request.workloads}
    return Outcome(planned, run_trials(timers, sequential, others, effort.rounds, run.within("timing")))
