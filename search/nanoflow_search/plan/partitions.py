"""Partitioned plans give attention SMs of its own; the best ones by prediction are found for each size of its share.

SMs are given to lanes once for a whole plan, so each size is planned for by itself. Plans come from two sides: from the
two stages, whose chunks all hold the batch's mean mix; and from the preset `overlapped`, on a grid of where it cuts the
batch and of how many decodes its first half holds, which the stages cannot choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import overlapped
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.checkpoint import Run
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.plan.op_graph import layer_problem, schedule_of, task_lane
from nanoflow_search.plan.two_stages import find_plans
from nanoflow_search.predict.decode_layout import even_groups
from nanoflow_search.predict.predict import Timing, predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError
from nanoflow_search.request import Effort

PARTITION_PART_LIMITS = ((2, 2), (3, 2))  # the most nano-tasks of each task: (up to attention, after it)
DECODE_SHIFTS = (-0.2, -0.1, 0.0, 0.1, 0.2)  # decodes of the first half, beyond its share of the tokens
FEW_LAYERS, KEPT = 8, 12  # the grid is predicted on so few layers, and so many of the best on the model's
GRID_ALONE = Effort(turns=0)


class PartitionedPlan(NamedTuple):
    """A plan whose attention has SMs of its own."""

    schedule: Schedule
    predicted: Timing
    gap: float  # of the solver; 0 for plans of the grid


def partitions_of(profile: Profile, graph: Graph, ranks: int = 1) -> list[dict[str, int]]:
    """Return the partitions (lane -> SMs) in which all operations were measured, ascending by attention's share.

    On several ranks collectives have SMs of their own, and attention its own ones or those of the compute lane.
    """
    whole = profile.header.device_sms
    attention = next(op.name for op in graph.operations if op.kernel == "attention")
    products = {op.name for op in graph.operations if op.resource is Resource.COMPUTE}
    collectives = {op.name for op in graph.operations if op.resource is Resource.NETWORK} if ranks > 1 else set()
    shares = {name: {p.sms for p in profile.points if p.operation == name} for name in profile.operations}
    of_attention = set.intersection(*(sms for name, sms in shares.items() if name.partition("/")[0] == attention))
    rest = set.intersection(*(sms for name, sms in shares.items() if name in products))
    if not collectives:
        sizes = of_attention & {whole - sms for sms in rest}
        return [{"memory": sms, "compute": whole - sms} for sms in sorted(sizes)]
    own = set.intersection(*(shares.get(name, set()) for name in collectives))
    found = [{"network": n, "compute": whole - n} for n in sorted(own) if min(rest) <= whole - n < whole]
    return found + [
        {"memory": sms, "network": n, "compute": whole - n - sms}
        for sms in sorted(of_attention)
        for n in sorted(own)
        if min(rest) <= whole - n - sms and sms < whole / 2
    ]


def find_partitioned(
    graph: Graph,
    model: TimingModel,
    num_layers: int,
    chunk_tokens: int,
    effort: Effort,
    run: Run,
    *,
    keep: int = 5,
    step: int = TILE,
) -> list[PartitionedPlan]:
    """Return the best `keep` plans, best first: one for each size of attention's partition and each way to cut it.

    `graph` is a layer on a single rank. The two stages cut a batch at multiples of `chunk_tokens`, the grid at
    multiples of `step`. What the run's checkpoint holds is not searched again.
    """
    found: list[PartitionedPlan] = []
    for partition in partitions_of(model.profile, graph):
        sms = partition["memory"]
        name = f"{sms}-sms.msgpack"
        if (plans := run.checkpoint.load(name, list[PartitionedPlan])) is None:
            schedules = [(schedule, 0.0) for schedule in _grid(graph, model, partition, step)]
            if effort.turns:
                # One file holds all that is found in a partition: the stages keep none of their own.
                schedules += solved(graph, 1, model, partition, chunk_tokens, effort, Run(say=run.say))
            plans = [PartitionedPlan(plan, predict(plan, model, num_layers), gap) for plan, gap in schedules]
            run.checkpoint.save(name, plans)
        found += plans
        best = min(found, key=layer_us)
        run.say(f"{sms} SMs of attention: {len(plans)} plans; {best.predicted.layer_us:.0f} us so far")
    unlike: dict[object, PartitionedPlan] = {}
    for one in sorted(found, key=layer_us):
        unlike.setdefault((one.schedule.partition["memory"], *(group.stop for group in one.schedule.groups)), one)
    best_plans = list(unlike.values())[:keep]
    for plan in best_plans:
        validate(plan.schedule, graph, num_layers, model.profile.header.device_sms)
    return best_plans


def best_by_grid(graph: Graph, model: TimingModel, num_layers: int) -> Schedule:
    """Return the plan of two nano-batches that is predicted to be fastest; this needs no solver.

    The grid is predicted on a few layers, and its best plans again on all layers.

    Raises:
        ProfileError: attention and products were not measured on SMs of their own.
    """
    few = min(num_layers, FEW_LAYERS)
    found = find_partitioned(graph, model, few, TILE, GRID_ALONE, Run(), keep=KEPT)
    if not found:
        raise ProfileError("attention and products were not measured on SMs of their own")
    return min((plan.schedule for plan in found), key=lambda plan: predict(plan, model, num_layers).layer_us)


def layer_us(found: PartitionedPlan) -> float:
    return found.predicted.layer_us


def _grid(graph: Graph, model: TimingModel, partition: dict[str, int], step: int) -> Iterator[Schedule]:
    """Yield the plans of two nano-batches whose first one holds a quarter to three quarters of the tokens."""
    tokens, whole = round(model.mix.tokens), model.profile.header.device_sms
    for stop in range(step, tokens, step):
        if not tokens / 4 <= stop <= 3 * tokens / 4:
            continue
        for shift in DECODE_SHIFTS:
            decodes = min(max(round(stop / tokens + shift, 2), 0.0), 1.0)
            yield overlapped(graph, tokens, stop, decodes, partition["memory"], whole, granularity=step)


def solved(
    graph: Graph,
    ranks: int,
    model: TimingModel,
    partition: dict[str, int],
    chunk_tokens: int,
    effort: Effort,
    run: Run,
) -> list[tuple[Schedule, float]]:
    """Return the plans of the two stages in a partition, with the solver's gaps."""
    tokens = round(model.mix.tokens)
    stops = range(chunk_tokens, tokens + 1, chunk_tokens)
    even = model.with_groups(even_groups(tokens, stops))

    def times(operations: tuple[str, ...], start: int, stop: int) -> float:
        return even.operations_us(operations, start, stop, partition[task_lane(graph, operations, ranks, partition)])

    problem = layer_problem(graph, ranks, tokens, chunk_tokens, times, partition)
    plans = find_plans(problem, even, chunk_tokens, effort, run, part_limits=PARTITION_PART_LIMITS, partition=partition)
    schedules = [(schedule_of(graph, problem, plan.shares.timeline, chunk_tokens), plan.gap) for plan in plans]
    return [(_with_even_groups(graph, schedule, partition), gap) for schedule, gap in schedules]


def _with_even_groups(graph: Graph, plan: Schedule, partition: dict[str, int]) -> Schedule:
    """Return the plan on a partition, with the batch's mean mix in each nano-batch of attention."""
    cuts: Sequence[int] = sorted({x.stop for x in plan.launches if graph[x.operation].kernel == "attention"})
    return replace(plan, partition=partition, groups=even_groups(plan.tokens, cuts))
