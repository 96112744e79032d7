"""find_candidates: the plans for batches of one size that are worth timing, and what is predicted of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import geometric_mean

import msgspec

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.checkpoint import SearchError, State
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.emit.picture import draw, walked
from nanoflow_search.plan.batch_case import Case, Form
from nanoflow_search.plan.op_graph import layer_problem, schedule_of
from nanoflow_search.plan.partitions import find_partitioned
from nanoflow_search.plan.problem import Problem
from nanoflow_search.plan.two_stages import Plan, find_plans, one_after_the_other
from nanoflow_search.request import Effort

ALIKE = 1e-4  # relative: plans whose predictions differ by less are, as a rule, one plan turned


class Candidate(msgspec.Struct, frozen=True):
    """A plan for batches of one size."""

    schedule: Schedule
    gap: float  # of the solver, in the worse of the two programs
    picture: str  # SVG
    name: str = "sequential"


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    plan: str
    workload: str
    layer_us: float


def find_candidates(case: Case, effort: Effort, state: State, progress: Callable[[str], None]) -> list[Candidate]:
    """Sequential, and the best plans that were found for any of the workloads, by what is predicted over all of them.

    Raises:
        SearchError: none was found in time.
    """
    found: dict[bytes, Candidate] = {}
    for workload in case.setting.workloads:

        def say(line: str, where: str = f"{case.tokens} tokens, {workload}") -> None:
            progress(f"{where}: {line}")

        where = state.within(workload.replace("/", "-"))
        for candidate in (
            *_partitioned(case, workload, effort, where, say),
            *_shared(case, workload, effort, where, say),
        ):
            found.setdefault(msgspec.json.encode(candidate.schedule), candidate)
    if not found:
        raise SearchError(f"{case.tokens} tokens: no plan in {effort.time_limit_s:g} s a program; raise --time-limit-s")
    unlike: dict[int, tuple[float, Candidate]] = {}
    for candidate in found.values():
        layer_us = geometric_mean(case.predicted_us(candidate.schedule, w) for w in case.setting.workloads)
        unlike.setdefault(round(math.log(layer_us) / ALIKE), (layer_us, candidate))
    best = sorted(unlike.values(), key=lambda entry: entry[0])[: effort.plans]
    named = [msgspec.structs.replace(plan, name=f"plan {number}") for number, (_, plan) in enumerate(best, 1)]
    return [_sequential(case), *named]


def predictions_of(case: Case, candidates: Sequence[Candidate]) -> list[Prediction]:
    return [
        Prediction(plan=plan.name, workload=workload, layer_us=case.predicted_us(plan.schedule, workload))
        for plan in candidates
        for workload in case.setting.workloads
    ]


def _partitioned(
    case: Case, workload: str, effort: Effort, state: State, progress: Callable[[str], None]
) -> list[Candidate]:
    """With attention on SMs of its own."""
    graph, layers, sms = case.graph(), case.setting.model.num_layers, case.profile.header.device_sms
    measured = case.measured(workload)
    plans = find_partitioned(
        graph,
        measured,
        layers,
        case.chunk_tokens,
        keep=2 * effort.plans,  # each has a twin that is the same plan turned
        turns=effort.turns,
        time_limit_s=effort.time_limit_s,
        once=state.within("partitioned").once,
        progress=progress,
    )
    problem = layer_problem(graph, 1, case.tokens, TILE, measured.times)
    return [
        Candidate(schedule, gap, draw(problem, walked(schedule, problem, measured, TILE), sms, TILE))
        for schedule, _, gap in plans
    ]


def _shared(
    case: Case, workload: str, effort: Effort, state: State, progress: Callable[[str], None]
) -> list[Candidate]:
    """With lanes that share SMs, in every form of collectives; none, if no such lanes were measured."""
    found: list[Candidate] = []
    if (measured := case.shared(workload)) is None:
        return found
    for form in case.forms:
        problem = case.problem(measured, form)
        plans = find_plans(
            problem,
            measured,
            case.chunk_tokens,
            turns=effort.turns,
            time_limit_s=effort.time_limit_s,
            once=state.within("split" if form else "whole").once,
            progress=progress,
        )
        found += [_candidate(case, problem, plan, form) for plan in plans]
    return found


def _candidate(case: Case, problem: Problem, plan: Plan, form: Form) -> Candidate:
    graph, chunk, sms = case.graph(form), case.chunk_tokens, case.profile.header.device_sms
    schedule = schedule_of(graph, problem, plan.shares.timeline, chunk, plan.shares.sms, form)
    validate(schedule, graph, case.setting.model.num_layers, sms)
    return Candidate(schedule, plan.gap, draw(problem, plan.shares, sms, chunk))


def _sequential(case: Case) -> Candidate:
    """With its picture on the first workload."""
    problem = case.problem(case.measured(case.setting.workloads[0]))
    picture = draw(problem, one_after_the_other(problem), case.profile.header.device_sms, case.chunk_tokens)
    return Candidate(sequential(case.setting.model.layer, case.tokens), 0.0, picture)
