"""search: from a model and a machine to a schedule file, in phases of which each can be cut and goes on from its files.

1. profile: operations alone and side by side, on the machine
2. plans: the two programs for each size of batch, and what is predicted of their best plans; needs a solver only
3. timing: those plans against sequential, on the machine
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_search.answer import answer, winner
from nanoflow_search.bound import bounds_us
from nanoflow_search.candidates import (
    Candidate,
    Prediction,
    find_candidates,
    predictions_of,
    problem_of,
)
from nanoflow_search.display import Display
from nanoflow_search.machine import Machine, measure_profile
from nanoflow_search.profile import Profile
from nanoflow_search.refine import Refined, Timer, refine
from nanoflow_search.setting import Effort, Phase, Setting
from nanoflow_search.sizes import chunk_tokens
from nanoflow_search.state import SearchError, State


class Found(NamedTuple):
    file: ScheduleFile
    picture: str  # SVG of the plan at B_dense


def search(
    setting: Setting,
    sizes: tuple[int, ...],
    effort: Effort,
    machine: Machine | None,
    profile_path: Path,
    state: State,
    display: Display,
    until: Phase = Phase.TIMING,
) -> Found | None:
    """None if an earlier phase is the last one wanted.

    `sizes` of batches; none: those that suit the workloads and the device's memory. `machine` is None where nothing
    can be measured: what the files of `state` do not hold must be measured elsewhere.

    Raises:
        SearchError: something is to be measured, and here is no machine; or the state is that of another search.
        ProfileError: the profile is of something else.
    """
    profile = _profile(setting, sizes, machine, profile_path, state, display)
    if until is Phase.PROFILE:
        return None
    sizes = sizes or setting.sizes(profile.header.device)
    state.claim(setting.request(profile, sizes, effort))
    display.begin("plans", len(sizes))
    plans, predictions, bounds = {}, {}, {}
    for tokens in sizes:
        plans[tokens] = find_candidates(setting, profile, tokens, effort, state, display.say)
        predictions[tokens] = _predict(setting, profile, tokens, plans[tokens], state)  # before anything is timed
        bounds[tokens] = _bounds_us(setting, profile, tokens, state)
        display.advance()
    if until is Phase.PLANS:
        return None
    display.begin("timing", effort.rounds * len(setting.workloads) * sum(len(found) - 1 for found in plans.values()))
    refined = {
        tokens: _time(setting, machine, profile, tokens, plans[tokens], effort, state, display) for tokens in sizes
    }
    file = answer(setting, profile, plans, predictions, refined, bounds)
    best = file.header.dense_batch_tokens
    return Found(file, plans[best][winner(refined[best])].picture)


def _profile(
    setting: Setting, sizes: tuple[int, ...], machine: Machine | None, path: Path, state: State, display: Display
) -> Profile:
    """A profile that plans were made from stays as it is."""
    if machine is not None and not state.claimed:
        display.begin("profile", None)
        path.parent.mkdir(parents=True, exist_ok=True)
        measure_profile(machine, setting, sizes or setting.sizes(machine.name), path, display.say)
    if not path.exists():
        raise SearchError(f"{path}: there is no profile, and no GPU here: take it where one is (--until profile)")
    return Profile.load(path)


def _predict(
    setting: Setting, profile: Profile, tokens: int, plans: Sequence[Candidate], state: State
) -> list[Prediction]:
    return state.once(
        f"{tokens}/predictions.json", list[Prediction], lambda: predictions_of(setting, profile, tokens, plans)
    )


def _bounds_us(setting: Setting, profile: Profile, tokens: int, state: State) -> dict[str, float]:
    """On the first workload."""
    measured = setting.measured(profile, setting.workloads[0], tokens)

    def make() -> dict[str, float]:
        return bounds_us(lambda there: problem_of(setting, there, tokens)[1], measured, chunk_tokens(tokens))

    return state.once(f"{tokens}/bounds.json", dict[str, float], make)


def _time(
    setting: Setting,
    machine: Machine | None,
    profile: Profile,
    tokens: int,
    plans: Sequence[Candidate],
    effort: Effort,
    state: State,
    display: Display,
) -> Refined:
    def timer(workload: str) -> Timer:
        @cache
        def made() -> Timer:
            """Only for what is not timed yet: it takes weights and pages."""
            if machine is None:
                raise SearchError("the plans are found; run the same command where a GPU is to time them")
            return machine.timer(setting, setting.mix(workload, tokens, profile.header.device))

        return lambda schedule: made()(schedule)

    sequential, *others = (plan.schedule for plan in plans)
    timers = {workload: timer(workload) for workload in setting.workloads}
    within = state.within(f"{tokens}/timing")
    return refine(timers, sequential, others, effort.rounds, once=within.once, progress=display.advance)
