"""The built-in plans: sequential, n nano-batches in lanes that overlap, and two in turns on SMs of their own."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from msgspec.structs import replace

from nanoflow_backend.graph.nano_batch import dependencies
from nanoflow_backend.graph.operation import Graph, Operation, Resource
from nanoflow_backend.schedule.plan import Group, Launch, Schedule, ScheduleError, Wait
from nanoflow_backend.schedule.validate import MOST_LAUNCHES, describe


def sequential(graph: Graph, tokens: int) -> Schedule:
    """One operation after the other on the whole batch: the plan without a search, and the base of comparisons."""
    launches = tuple(Launch(operation=op.name, start=0, stop=tokens, lane="compute") for op in graph.operations)
    return Schedule(tokens=tokens, launches=launches)


def nano_batched(graph: Graph, tokens: int, parts: int, granularity: int = 1) -> Schedule:
    """`parts` nano-batches of nearly equal size; each resource is a lane, and lanes overlap where values let them.

    Raises: ValueError, too many parts or none.
    """
    grains = -(-tokens // granularity)
    most = min(grains, MOST_LAUNCHES // len(graph.operations))
    if not 1 <= parts <= most:
        raise ValueError(f"parts: expected 1..{most} nano-batches of {tokens} tokens, got {parts}")
    boundaries = [min(grains * part // parts * granularity, tokens) for part in range(parts + 1)]
    launches = [
        Launch(operation=op.name, start=start, stop=stop, lane=op.resource.value)
        for op in graph.operations
        for start, stop in pairwise(boundaries)
    ]
    return synchronise(Schedule(tokens=tokens, launches=tuple(launches), granularity=granularity), graph)


def overlapped(
    graph: Graph, tokens: int, stop: int, decodes: float, attention_sms: int, device_sms: int, granularity: int = 1
) -> Schedule:
    """Two nano-batches, cut at `stop`: attention of one on SMs of its own, while the others work for the other one.

    The first has this share of the `decodes`. It runs half a layer ahead: while its attention runs, the rest of the
    layer before and the start of this one run on the second, and then the other way round.
    """
    names = [op.name for op in graph.operations]
    at = next(i for i, op in enumerate(graph.operations) if op.kernel == "attention")

    def launches(operations: list[str], start: int, stop: int, layers_ahead: int = 0) -> list[Launch]:
        return [
            Launch(
                operation=name,
                start=start,
                stop=stop,
                lane="memory" if name == names[at] else "compute",
                layers_ahead=layers_ahead,
            )
            for name in operations
        ]

    until, after = names[: at + 1], names[at + 1 :]
    period = (
        *launches(until, stop, tokens),
        *launches(after, 0, stop),
        *launches(until, 0, stop, layers_ahead=1),
        *launches(after, stop, tokens),
    )
    schedule = Schedule(
        tokens=tokens,
        launches=period,
        granularity=granularity,
        partition={"memory": attention_sms, "compute": device_sms - attention_sms},
        groups=(Group(stop, decodes), Group(tokens, 1 - decodes)),
    )
    return synchronise(schedule, graph)


def alternating(
    graph: Graph, tokens: int, stop: int, decodes: float, partition: Mapping[str, int], granularity: int = 1
) -> Schedule:
    """Two nano-batches, cut at `stop`, that take turns half a layer apart: collectives of one beside products of the
    other.

    A layer's graph falls into two at the last collective between products: what leads to it, and the rest. `partition`
    gives SMs to the lanes compute and network, and to memory where attention is to have its own ones. The first
    nano-batch has this share of the `decodes`.

    Raises: ScheduleError, a graph without a collective between products.
    """
    operations = graph.operations
    computed = [i for i, op in enumerate(operations) if op.resource is Resource.COMPUTE]
    collectives = [i for i, op in enumerate(operations) if op.resource is Resource.NETWORK and i > computed[0]]
    between = [i for i in collectives if i < computed[-1]]
    if not between:
        raise ScheduleError("expected a graph with a collective between two products, to take turns at")
    # Collectives that a layer begins with belong to the end of the one before: they follow its last product.
    leading = next(i for i, op in enumerate(operations) if op.resource is not Resource.NETWORK)

    def lane(op: Operation) -> str:
        alone = op.resource is Resource.NETWORK or (op.kernel == "attention" and Resource.MEMORY in partition)
        return (op.resource if alone else Resource.COMPUTE).value

    def launches(first: int, after: int, start: int, stop: int, layers_ahead: int = 0) -> list[Launch]:
        return [
            Launch(operation=op.name, start=start, stop=stop, lane=lane(op), layers_ahead=layers_ahead)
            for op in operations[first:after]
        ]

    def turn(start: int, stop: int) -> list[Launch]:
        return [*launches(middle, len(operations), start, stop), *launches(0, leading, start, stop, layers_ahead=1)]

    middle = between[-1] + 1
    period = (
        *turn(0, stop),
        *launches(leading, middle, stop, tokens),
        *launches(leading, middle, 0, stop, layers_ahead=1),
        *turn(stop, tokens),
    )
    schedule = Schedule(
        tokens=tokens,
        launches=period,
        granularity=granularity,
        partition=dict(partition),
        groups=(Group(stop, decodes), Group(tokens, 1 - decodes)),
    )
    return synchronise(schedule, graph)


def synchronise(schedule: Schedule, graph: Graph) -> Schedule:
    """The same launches with just the waits they need: none that lanes or other waits already imply.

    Raises: ScheduleError, a launch reads what is written later.
    """
    needed = dependencies(graph, [launch.nano for launch in schedule.launches])
    # Four layers show every way in which a launch meets those of the layer before, at both ends of the model too;
    # launches that run ahead meet further ones.
    steps = schedule.unroll(4 + 2 * max((launch.layers_ahead for launch in schedule.launches), default=0))
    index = {step: k for k, step in enumerate(steps)}
    waits: list[set[Wait]] = [set() for _ in schedule.launches]
    ended: list[int] = []  # for each step the mask of itself and of what has ended before it
    last_in_lane: dict[str, int] = {}

    for k, (layer, number) in enumerate(steps):
        launch = schedule.launches[number]
        mask = 1 << k | (ended[last_in_lane[launch.lane]] if launch.lane in last_in_lane else 0)
        targets = {index[layer - d.layers_back, d.writer]: d for d in needed[number] if d.layers_back <= layer}
        known = [t for t, d in targets.items() if Wait(d.writer, d.layers_back) in waits[number]]
        for target in known + sorted(targets.keys() - set(known), reverse=True):  # the latest one implies the most
            if target >= k:
                raise ScheduleError(f"{describe(number, launch)} is issued before what it reads is written")
            if not mask >> target & 1:
                waits[number].add(Wait(targets[target].writer, targets[target].layers_back))
                mask |= ended[target]
        ended.append(mask)
        last_in_lane[launch.lane] = k
    launches = (
        replace(launch, waits=tuple(sorted(needs))) for launch, needs in zip(schedule.launches, waits, strict=True)
    )
    return replace(schedule, launches=tuple(launches))
