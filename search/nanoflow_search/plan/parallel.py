"""Plans of tensor-parallel groups: in which form all-reduces run, on how many SMs, beside what.

A grid of the preset `alternating` is predicted in every form and partition that was measured, and beside it sequential
in each form: where there is little to overlap, a fused form may be all that is to win. The two stages are solved where
the grid is best: a solver takes a minute or more for what the grid predicts in a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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


def find_parallel(case: BatchCase, workload: str, effort: Effort, run: Run, keep: int) -> list[PartitionedPlan]:
    """Return the best `keep` plans for a workload, best first.

    For each form and partition there is at most one of the grid and one of the two stages. What the run's checkpoint
    holds is not searched again.
    """
    model, layers, ranks = case.timing_model(workload), case.request.model.num_layers, case.request.ranks
    few = min(layers, FEW_LAYERS)
    settings = {
        f"{describe_forms(forms)}, {_describe(partition)}": (forms, partition)
        for forms in case.forms
        for partition in ({}, *partitions_of(case.profile, case.graph(forms), ranks))
        if forms or partition  # sequential with whole all-reduces is what plans are compared with
    }

    def best_of(schedules: Iterable[tuple[Schedule, float]]) -> PartitionedPlan | None:
        predicted = (PartitionedPlan(plan, predict(plan, model, few), gap) for plan, gap in schedules)
        return min(predicted, key=layer_us, default=None)

    if (gridded := run.checkpoint.load("grid.msgpack", dict[str, PartitionedPlan])) is None:
        plans = {name: best_of((plan, 0.0) for plan in _grid(case, *setting)) for name, setting in settings.items()}
        gridded = run.checkpoint.save("grid.msgpack", {name: plan for name, plan in plans.items() if plan})
    found = sorted(gridded.values(), key=layer_us)
    promising = [name for name in sorted(gridded, key=lambda name: layer_us(gridded[name])) if settings[name][1]]
    for name in promising[:SOLVED] if effort.turns else ():
        forms, partition = settings[name]
        file = f"{name.replace(', ', '-')}.msgpack"
        if (of_stages := run.checkpoint.load(file, list[PartitionedPlan])) is None:
            schedules = solved(case.graph(forms), ranks, model, partition, case.chunk_tokens, effort, Run(say=run.say))
            best = best_of((replace(plan, all_reduces=dict(forms)), gap) for plan, gap in schedules)
            of_stages = run.checkpoint.save(file, [best] if best else [])
        found += of_stages
        told = [f"{layer_us(plan):.0f} us" for plan in of_stages] or ["no plan in time"]
        run.say(f"{name}: {told[0]}, by the grid {layer_us(gridded[name]):.0f} us")
    # Ramps at the first and the last layer count: what is kept is predicted on all layers.
    likely = sorted(found, key=layer_us)[: 2 * keep]
    whole = [plan._replace(predicted=predict(plan.schedule, model, layers)) for plan in likely]
    best_plans = sorted(whole, key=layer_us)[:keep]
    for plan in best_plans:
        graph = case.graph(plan.schedule.all_reduces)
        validate(plan.schedule, graph, layers, case.profile.header.device_sms, ranks=ranks)
    return best_plans


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
