"""find_candidates: the plans for batches of one size that are worth timing, and what is predicted of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import geometric_mean

import msgspec

from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.layer import layer_problem, schedule_of
from nanoflow_search.measured import Measured
from nanoflow_search.planner import find_plans, one_after_the_other
from nanoflow_search.predict import predict
from nanoflow_search.problem import Problem
from nanoflow_search.profile import Profile
from nanoflow_search.setting import Effort, Setting
from nanoflow_search.sizes import chunk_tokens
from nanoflow_search.state import SearchError, State
from nanoflow_search.timeline import draw

ALIKE = 1e-4  # predictions that differ by less, relative


class Candidate(msgspec.Struct, frozen=True):
    """A plan for batches of one size."""

    name: str
    schedule: Schedule
    gap: float = 0.0  # of the solver, in the worse of the two programs
    picture: str = ""  # SVG


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    plan: str
    workload: str
    layer_us: float


def find_candidates(
    setting: Setting, profile: Profile, tokens: int, effort: Effort, state: State, progress: Callable[[str], None]
) -> list[Candidate]:
    """Sequential, and the best plans found for any of the workloads, by what is predicted over all of them."""

    def make() -> list[Candidate]:
        found = [
            candidate
            for workload in setting.workloads
            for form in forms(setting, profile)
            for candidate in _plans(setting, profile, workload, tokens, form, effort, state, progress)
        ]
        if not found:
            raise SearchError(f"{tokens} tokens: no plan in {effort.time_limit_s:g} s a program; raise --time-limit-s")
        unlike: dict[
            int, tuple[float, Candidate]
        ] = {}  # those that are predicted alike are, as a rule, one plan turned
        for candidate in found:
            layer_us = _mean_us(predictions_of(setting, profile, tokens, [candidate]))
            unlike.setdefault(round(math.log(layer_us) / ALIKE), (layer_us, candidate))
        best = sorted(unlike.values(), key=lambda entry: entry[0])[: effort.plans]
        named = [msgspec.structs.replace(plan, name=f"plan {i}") for i, (_, plan) in enumerate(best, 1)]
        return [_sequential(setting, profile, tokens), *named]

    return state.once(f"{tokens}/plans.msgpack", list[Candidate], make)


def predictions_of(
    setting: Setting, profile: Profile, tokens: int, candidates: Sequence[Candidate]
) -> list[Prediction]:
    return [
        Prediction(
            plan=candidate.name,
            workload=workload,
            layer_us=predict(
                candidate.schedule, setting.measured(profile, workload, tokens), setting.model.num_layers
            ).layer_us,
        )
        for candidate in candidates
        for workload in setting.workloads
    ]


def forms(setting: Setting, profile: Profile) -> list[tuple[str, ...]]:
    """The all-reduces that run as reduce-scatter and all-gather: none; and all, where a profile knows those."""
    layer, known = setting.model.layer, {curve.partition("/")[0] for curve in profile.operations}
    reduces = tuple(op.name for op in layer.operations if op.kernel == "all_reduce")
    split = split_all_reduce(layer, reduces, setting.ranks)
    return [(), reduces] if setting.ranks > 1 and {op.name for op in split.operations} <= known else [()]


def problem_of(
    setting: Setting, measured: Measured, tokens: int, form: tuple[str, ...] = ()
) -> tuple[Graph, Problem, int]:
    """A layer with its all-reduces in a form, what is to be planned of it, and the tokens of a chunk."""
    chunk = chunk_tokens(tokens)
    graph = split_all_reduce(setting.model.layer, form, setting.ranks)
    return graph, layer_problem(graph, setting.ranks, tokens, chunk, measured.times), chunk


def _plans(
    setting: Setting,
    profile: Profile,
    workload: str,
    tokens: int,
    form: tuple[str, ...],
    effort: Effort,
    state: State,
    progress: Callable[[str], None],
) -> list[Candidate]:
    measured = setting.measured(profile, workload, tokens)
    graph, problem, chunk = problem_of(setting, measured, tokens, form)
    within = state.within(f"{tokens}/{workload.replace('/', '-')}{'-split' if form else ''}")
    found = find_plans(
        problem,
        measured,
        chunk,
        turns=effort.turns,
        time_limit_s=effort.time_limit_s,
        once=within.once,
        progress=lambda line: progress(f"{tokens} tokens, {workload}: {line}"),
    )
    sms = profile.header.device_sms
    candidates = []
    for plan in found:
        schedule = schedule_of(graph, problem, plan.shares.timeline, chunk, plan.shares.sms, form)
        validate(schedule, graph, setting.model.num_layers, sms)
        gap = max(plan.stage_one_gap, plan.shares.timeline.gap)
        candidates.append(Candidate("", schedule, gap, draw(problem, plan.shares, sms, chunk)))
    return candidates


def _sequential(setting: Setting, profile: Profile, tokens: int) -> Candidate:
    """With its picture on the first workload."""
    _, problem, chunk = problem_of(setting, setting.measured(profile, setting.workloads[0], tokens), tokens)
    picture = draw(problem, one_after_the_other(problem), profile.header.device_sms, chunk)
    return Candidate("sequential", sequential(setting.model.layer, tokens), picture=picture)


def _mean_us(predictions: Sequence[Prediction]) -> float:
    return geometric_mean(prediction.layer_us for prediction in predictions)
