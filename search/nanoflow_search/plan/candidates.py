"""The candidates are the plans for batches of one size that are worth timing, with what is predicted of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import geometric_mean

import msgspec

from nanoflow_backend.graph.collectives import describe_forms
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.checkpoint import Run, SearchError
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.plan.op_graph import schedule_of
from nanoflow_search.plan.parallel import find_parallel
from nanoflow_search.plan.partitions import find_partitioned
from nanoflow_search.plan.two_stages import find_plans
from nanoflow_search.request import Effort

ALIKE = 1e-4  # relative: plans whose predictions differ by less are usually the same plan rotated in time


class Candidate(msgspec.Struct, frozen=True):
    """A plan for batches of one size."""

    schedule: Schedule
    gap: float  # of the solver, in the worse of the two stages; 0 for plans that it did not find
    name: str = "sequential"


class PlanPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """The predicted time of a layer under a plan on one workload."""

    plan: str
    workload: str
    layer_us: float


def find_candidates(case: BatchCase, effort: Effort, run: Run) -> list[Candidate]:
    """Return sequential, then the best plans by predicted time over all workloads, best first.

    Raises:
        SearchError: no plan was found in time.
    """
    found: dict[bytes, Candidate] = {}
    for workload in case.request.workloads:
        part = run.within(workload.replace("/", "-"), label=f"{case.tokens} tokens, {workload}")
        own_sms = _partitioned if case.request.ranks == 1 else _parallel
        for candidate in (*own_sms(case, workload, effort, part), *_shared(case, workload, effort, part)):
            found.setdefault(msgspec.json.encode(candidate.schedule), candidate)
    if not found:
        raise SearchError(f"{case.tokens} tokens: no plan in {effort.time_limit_s:g} s a program; raise --time-limit-s")
    unlike: dict[int, tuple[float, Candidate]] = {}
    for candidate in found.values():
        layer_us = geometric_mean(case.predicted_us(candidate.schedule, w) for w in case.request.workloads)
        unlike.setdefault(round(math.log(layer_us) / ALIKE), (layer_us, candidate))
    best = sorted(unlike.values(), key=lambda entry: entry[0])[: effort.plans]
    named = [msgspec.structs.replace(plan, name=f"plan {number}") for number, (_, plan) in enumerate(best, 1)]
    return [Candidate(sequential(case.request.model.layer, case.tokens), 0.0), *named]


def predictions_of(case: BatchCase, candidates: Sequence[Candidate]) -> list[PlanPrediction]:
    """Return what is predicted of every candidate on every workload."""
    return [
        PlanPrediction(plan=plan.name, workload=workload, layer_us=case.predicted_us(plan.schedule, workload))
        for plan in candidates
        for workload in case.request.workloads
    ]


def _partitioned(case: BatchCase, workload: str, effort: Effort, run: Run) -> Iterator[Candidate]:
    """Find plans whose attention has SMs of its own."""
    layers, model = case.request.model.num_layers, case.timing_model(workload)
    plans = find_partitioned(
        case.graph(),
        model,
        layers,
        case.chunk_tokens,
        effort,
        run.within("partitioned"),
        keep=2 * effort.plans,  # each has a twin that is the same plan rotated in time
    )
    for plan in plans:
        yield Candidate(plan.schedule, plan.gap)


def _parallel(case: BatchCase, workload: str, effort: Effort, run: Run) -> Iterator[Candidate]:
    """Find plans of several ranks whose collectives have SMs of their own."""
    for plan in find_parallel(case, workload, effort, run.within("partitioned"), keep=2 * effort.plans):
        yield Candidate(plan.schedule, plan.gap)


def _shared(case: BatchCase, workload: str, effort: Effort, run: Run) -> Iterator[Candidate]:
    """Find plans whose lanes share SMs, in every form of collectives; none, if no such lanes were measured."""
    if (model := case.shared_timing_model(workload)) is None:
        return
    for forms in case.forms:
        graph, problem = case.graph(forms), case.problem(model, forms)
        part = run.within(describe_forms(forms))
        for plan in find_plans(problem, model, case.chunk_tokens, effort, part):
            schedule = schedule_of(
                graph, problem, plan.shares.timeline, case.chunk_tokens, plan.shares.sms, all_reduces=forms
            )
            layers, sms, ranks = case.request.model.num_layers, case.profile.header.device_sms, case.request.ranks
            validate(schedule, graph, layers, sms, ranks=ranks)
            yield Candidate(schedule, plan.gap)
