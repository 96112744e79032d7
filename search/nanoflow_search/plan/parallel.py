"""Plans of tensor-parallel groups: in which form all-reduces run, on how many SMs, beside what.

A grid of the preset `alternating` is predicted in every form and partition that was measured, and beside it sequential
in each form: where there is little to overlap, a fused form may be all that is to win. The two stages are solved where
the grid is best: a solver takes a minute or more for what the grid predicts in a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from nanoflow_backend.graph.collectives import Forms, describe_forms
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import alternating, sequential
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.checkpoint import Run
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.plan.partitions import FEW_LAYERS, PartitionedPlan, layer_us, partitions_of, solved
from nanoflow_search.predict.predict import predict
from nanoflow_search.request import Effort

SOLVED = 2  # pairs of form and partition, the best by the grid, for which the two stages are solved


class ParallelPlan(NamedTuple):
    """A plan with its all-reduces in some form, and the solver's gap; 0 for plans of the grid."""

    schedule: Schedule
    gap: float


def find_parallel(case: BatchCase, workload: str, effort: Effort, run: Run, keep: int) -> Iterator[ParallelPlan]:
    """Yield the best `keep` plans for a workload, best first, at most one for each form and partition.

    What the run's checkpoint holds is not searched again.
    """
    model, request = case.timing_model(workload), case.request
    layers, ranks, sms = request.model.num_layers, request.ranks, case.profile.header.device_sms
    found: dict[tuple[str, str], PartitionedPlan] = {}
    settings = {
        (describe_forms(forms), _describe(partition)): (forms, partition)
        for forms in case.forms
        for partition in ({}, *partitions_of(case.profile, case.graph(forms), ranks))
        if forms or partition  # sequential with whole all-reduces is what plans are compared with
    }
    few = min(layers, FEW_LAYERS)
    if (gridded := run.checkpoint.load("grid.msgpack", dict[str, PartitionedPlan])) is None:
        plans = {
            " ".join(key): min(
                (PartitionedPlan(plan, predict(plan, model, few), 0.0) for plan in _grid(case, *setting)), key=layer_us
            )
            for key, setting in settings.items()
        }
        gridded = run.checkpoint.save("grid.msgpack", plans)
    for key in settings:
        found[key] = gridded[" ".join(key)]
    ordered = sorted(found, key=lambda key: layer_us(found[key]))
    for key in [key for key in ordered if settings[key][1]][:SOLVED] if effort.turns else ():
        forms, partition = settings[key]
        name = f"{key[0]}-{key[1]}.msgpack"
        if (plans_there := run.checkpoint.load(name, list[PartitionedPlan])) is None:
            schedules = solved(case.graph(forms), ranks, model, partition, case.chunk_tokens, effort, Run(say=run.say))
            plans_there = [
                PartitionedPlan(plan, predict(plan, model, few), gap)
                for plan, gap in ((replace(plan, all_reduces=dict(forms)), gap) for plan, gap in schedules)
            ]
            run.checkpoint.save(name, plans_there)
        found[key] = min((found[key], *plans_there), key=layer_us)
        alone_us = layer_us(gridded[" ".join(key)])
        run.say(f"{key[0]}, {key[1]}: {layer_us(found[key]):.0f} us, by the grid alone {alone_us:.0f}")
    for key in sorted(found, key=lambda key: layer_us(found[key]))[:keep]:
        schedule = found[key].schedule
        validate(schedule, case.graph(settings[key][0]), layers, sms, ranks=ranks)
        yield ParallelPlan(schedule, found[key].gap)


def _grid(case: BatchCase, forms: Forms, partition: dict[str, int]) -> Iterator[Schedule]:
    """Yield the plans of two nano-batches whose first one holds a quarter to three quarters of the tokens; without a
    partition the sequential plan alone."""
    graph, tokens, step = case.graph(forms), case.tokens, case.chunk_tokens
    if not partition:
        yield replace(sequential(graph, tokens), all_reduces=dict(forms))
        return
    for stop in range(step, tokens, step):
        if tokens / 4 <= stop <= 3 * tokens / 4:
            plan = alternating(graph, tokens, stop, stop / tokens, partition, granularity=step)
            yield replace(plan, all_reduces=dict(forms))


def _describe(partition: dict[str, int]) -> str:
    return "-".join(f"{lane}-{sms}" for lane, sms in partition.items()) or "sequential"
