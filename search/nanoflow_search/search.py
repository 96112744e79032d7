"""search: from a model and a machine to a schedule file, in phases of which each can be cut and goes on from its files.

1. profile: operations alone and side by side, on the machine
2. plans: the two programs for each size of batch, and what is predicted of their best plans; needs a solver only
3. timing: those plans against sequential, on the machine
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_search.checkpoint import SearchError, State
from nanoflow_search.emit.progress import Display
from nanoflow_search.emit.schedule_file import Outcome, Planned, answer
from nanoflow_search.emit.trials import Refined, Timer, refine
from nanoflow_search.hardware.machine import Machine, measure_profile
from nanoflow_search.plan.batch_case import Case
from nanoflow_search.plan.candidates import Candidate, Prediction, find_candidates, predictions_of
from nanoflow_search.profile.data import Profile
from nanoflow_search.request import Effort, Phase, Setting


def search(
    setting: Setting,
    sizes: tuple[int, ...],
    effort: Effort,
    machine: Machine | None,
    profile_path: Path,
    state: State,
    display: Display,
    until: Phase = Phase.TIMING,
) -> tuple[ScheduleFile, Candidate] | None:
    """The file, and its plan at B_dense; None if an earlier phase is the last one wanted.

    `sizes` of batches, ascending; none: those that suit the workloads and the device's memory. `machine` is None where
    nothing can be measured: what the files of `state` do not hold must be measured elsewhere.

    Raises:
        SearchError: something is to be measured, and here is no machine; or the state is that of another search.
        ProfileError: the profile is of something else.
    """
    profile = _profile(setting, sizes, effort, machine, profile_path, state, display)
    if until is Phase.PROFILE:
        return None
    sizes = sizes or setting.sizes(profile.header.device)
    state.claim(setting.request(profile, sizes, effort))
    display.begin("plans", len(sizes))
    planned = []
    for tokens in sizes:
        planned.append(_plan(Case(setting, profile, tokens), effort, state.within(str(tokens)), display))
        display.advance()
    if until is Phase.PLANS:
        return None
    trials = len(setting.workloads) * sum(len(found.plans) - 1 for found in planned)
    display.begin("timing", effort.rounds * trials)
    timed = [_time(found, effort, machine, state.within(str(found.case.tokens)), display) for found in planned]
    return answer([Outcome(*found, refined) for found, refined in zip(planned, timed, strict=True)])


def _profile(
    setting: Setting,
    sizes: tuple[int, ...],
    effort: Effort,
    machine: Machine | None,
    path: Path,
    state: State,
    display: Display,
) -> Profile:
    """A profile that plans were made from stays as it is."""
    if machine is not None and not state.claimed:
        display.begin("profile", None)
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_profile(machine, setting, sizes or setting.sizes(machine.name), effort.shared, path, display.say)
    if not path.exists():
        raise SearchError(f"{path}: there is no profile, and no GPU here: take it where one is (--until profile)")
    return Profile.load(path)


def _plan(case: Case, effort: Effort, state: State, display: Display) -> Planned:
    """On file before anything is timed."""
    once = state.once
    plans = once("plans.msgpack", list[Candidate], lambda: find_candidates(case, effort, state, display.say))
    predictions = once("predictions.json", list[Prediction], lambda: predictions_of(case, plans))
    return Planned(case, plans, predictions, once("bounds.json", dict[str, float], case.bounds_us))


def _time(found: Planned, effort: Effort, machine: Machine | None, state: State, display: Display) -> Refined:
    case = found.case

    def timer(workload: str) -> Timer:
        @cache
        def made() -> Timer:
            """Only for what is not timed yet: it takes weights and pages."""
            if machine is None:
                raise SearchError("the plans are found; run the same command where a GPU is to time them")
            return machine.timer(case.setting, case.mix(workload))

        return lambda schedule: made()(schedule)

    sequential, *others = (plan.schedule for plan in found.plans)
    timers = {workload: timer(workload) for workload in case.setting.workloads}
    once = state.within("timing").once
    return refine(timers, sequential, others, effort.rounds, once=once, progress=display.advance)
