"""find_partitioned: the best plans whose attention has SMs of its own, by prediction.

SMs are given to lanes once for a whole plan, so each size of attention's share is planned for by itself. Plans come
from two sides: the two programs, whose chunks all hold the batch's mean mix; and the preset `overlapped` on a grid of
where it cuts the batch and of how many decodes its first half has, which no program chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import overlapped
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.checkpoint import Once, always
from nanoflow_search.cost.batch_sizes import TILE
from nanoflow_search.plan.op_graph import lane, layer_problem, schedule_of
from nanoflow_search.plan.two_stages import find_plans
from nanoflow_search.predict.decode_layout import evenly
from nanoflow_search.predict.predict import Timing, predict
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Profile, ProfileError

PARTS = ((2, 2), (3, 2))  # nano-tasks up to attention and after it
SHARES = (-0.2, -0.1, 0.0, 0.1, 0.2)  # decodes of the first half beyond its part of the tokens
FEW_LAYERS, KEPT = 8, 12  # all plans of the grid are predicted on so few layers, and so many of the best on the model's


class Found(NamedTuple):
    schedule: Schedule
    predicted: Timing
    gap: float  # of the solver; 0 for what it did not find


def partitions_of(profile: Profile, graph: Graph) -> list[dict[str, int]]:
    """By lane, those that attention and all products were measured in."""
    whole = profile.header.device_sms
    attention = next(op.name for op in graph.operations if op.kernel == "attention")
    products = {op.name for op in graph.operations if op.resource is Resource.COMPUTE}
    shares = {name: {p.sms for p in profile.points if p.operation == name} for name in profile.operations}
    own = [sms for name, sms in shares.items() if name.partition("/")[0] == attention]
    rest = [sms for name, sms in shares.items() if name in products]
    sizes = set.intersection(*own) & {whole - sms for sms in set.intersection(*rest)}
    return [{"memory": sms, "compute": whole - sms} for sms in sorted(sizes)]


def find_partitioned(
    graph: Graph,
    measured: Measured,
    num_layers: int,
    chunk_tokens: int,
    *,
    keep: int = 5,
    step: int = 128,
    turns: int = 2,
    time_limit_s: float = 10.0,
    once: Once = always,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Found]:
    """The best `keep`, best first: one for each size of attention's share and each way to cut attention.

    `graph`: of one rank. `chunk_tokens` is what the programs cut a batch into, `step` what the grid does. `turns` = 0
    leaves the programs out: the grid needs no solver. What `once` knows is not searched again.
    """
    found: list[Found] = []
    for partition in partitions_of(measured.profile, graph):
        sms = partition["memory"]

        def search(partition: dict[str, int] = partition) -> list[Found]:
            plans = [(plan, 0.0) for plan in _grid(graph, measured, partition, step)]
            if turns:
                plans += _solved(graph, measured, partition, chunk_tokens, turns, time_limit_s, progress)
            return [Found(plan, predict(plan, measured, num_layers), gap) for plan, gap in plans]

        plans = once(f"{sms}-sms.msgpack", list[Found], search)
        found += plans
        best = min(found, key=_layer_us)
        progress(f"{sms} SMs of attention: {len(plans)} plans; {best.predicted.layer_us:.0f} us so far")
    unlike: dict[object, Found] = {}
    for one in sorted(found, key=_layer_us):
        unlike.setdefault((one.schedule.partition["memory"], *(group.stop for group in one.schedule.groups)), one)
    best_plans = list(unlike.values())[:keep]
    for plan in best_plans:
        validate(plan.schedule, graph, num_layers, measured.profile.header.device_sms)
    return best_plans


def best_by_grid(graph: Graph, measured: Measured, num_layers: int) -> Schedule:
    """The plan of two nano-batches that is predicted to take least: on all layers, of the grid's best on a few.

    Raises:
        ProfileError: attention and products were not measured on SMs of their own.
    """
    few = min(num_layers, FEW_LAYERS)
    found = find_partitioned(graph, measured, few, TILE, keep=KEPT, step=TILE, turns=0)
    if not found:
        raise ProfileError("attention and products were not measured on SMs of their own")
    return min((plan.schedule for plan in found), key=lambda plan: predict(plan, measured, num_layers).layer_us)


def _layer_us(found: Found) -> float:
    return found.predicted.layer_us


def _grid(graph: Graph, measured: Measured, partition: dict[str, int], step: int) -> Iterator[Schedule]:
    tokens, whole = round(measured.mix.tokens), measured.profile.header.device_sms
    for stop in range(step, tokens, step):
        if not tokens / 4 <= stop <= 3 * tokens / 4:
            continue
        for more in SHARES:
            decodes = min(max(round(stop / tokens + more, 2), 0.0), 1.0)
            yield overlapped(graph, tokens, stop, decodes, partition["memory"], whole, granularity=step)


def _solved(
    graph: Graph,
    measured: Measured,
    partition: dict[str, int],
    chunk_tokens: int,
    turns: int,
    time_limit_s: float,
    progress: Callable[[str], None],
) -> list[tuple[Schedule, float]]:
    tokens = round(measured.mix.tokens)
    stops = range(chunk_tokens, tokens + 1, chunk_tokens)
    measured = measured.of_groups(evenly(tokens, stops))

    def times(run: tuple[str, ...], start: int, stop: int) -> float:
        return measured.choice(run, start, stop, partition[lane(graph, run, ranks=1)]).duration_us

    problem = layer_problem(graph, 1, tokens, chunk_tokens, times)
    plans = find_plans(
        problem, measured, chunk_tokens,
        parts=PARTS, turns=turns, partition=partition, time_limit_s=time_limit_s, progress=progress,
    )  # fmt: skip
    return [
        (_dealt(graph, schedule_of(graph, problem, plan.shares.timeline, chunk_tokens), partition), plan.gap)
        for plan in plans
    ]


def _dealt(graph: Graph, plan: Schedule, partition: dict[str, int]) -> Schedule:
    """On a partition, with the mean mix in each nano-batch of attention."""
    cuts: Sequence[int] = sorted({x.stop for x in plan.launches if graph[x.operation].kernel == "attention"})
    return replace(plan, partition=partition, groups=evenly(plan.tokens, cuts))
