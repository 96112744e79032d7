"""Schedules to test with, and the interleavings of their lanes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from msgspec.structs import replace

from nanoflow_backend.config.precision import BFLOAT16, FLOAT32, Precision
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.nano_batch import dependencies
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Launch, Schedule, Wait
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential, synchronise


def in_lanes(schedule: Schedule, graph: Graph, lanes: dict[str, str]) -> Schedule:
    """The same launches with the operations named in `lanes` moved there."""
    moved = tuple(replace(x, lane=lanes.get(x.operation, x.lane), waits=()) for x in schedule.launches)
    return synchronise(replace(schedule, launches=moved), graph)


def rotated(graph: Graph, schedule: Schedule, ahead: tuple[str, ...], stop: int) -> Schedule:
    """The operations `ahead`, on tokens before `stop`, run at the end of the layer before."""

    def leads(launch: Launch) -> bool:
        return launch.operation in ahead and launch.stop <= stop

    rest = [x for x in schedule.launches if not leads(x)]
    leading = [replace(x, layers_ahead=1) for x in schedule.launches if leads(x)]
    # Behind the last launch that they read from: the first rows of the layer's outputs.
    last = max(i for i, x in enumerate(rest) if x.start < stop and set(graph[x.operation].outputs) & set(graph.outputs))
    launches = tuple(replace(x, waits=()) for x in (*rest[: last + 1], *leading, *rest[last + 1 :]))
    return synchronise(replace(schedule, launches=launches), graph)


def plans(graph: Graph, tokens: int) -> dict[str, Schedule]:
    """The built-in plans on all SMs, with lanes of their own for append and attention, with a layer's start ahead."""
    two, three = nano_batched(graph, tokens, 2), nano_batched(graph, tokens, 3)
    apart = {"rope_append": "append", "attention": "attend"}
    return {
        "sequential": sequential(graph, tokens),
        "two": two,
        "three": three,
        "apart": in_lanes(three, graph, apart),
        "append in the network lane": in_lanes(two, graph, {"rope_append": "network"}),
        "attend beside compute": in_lanes(two, graph, {"attention": "compute"}),
        "overlapped": replace(overlapped(graph, tokens, tokens // 2, 0.5, 1, 2), partition={}),
        "ahead": rotated(graph, two, ("attention_norm", "qkv"), tokens // 2),
        "ahead and apart": in_lanes(
            rotated(graph, three, ("attention_norm", "qkv", "rope_append"), three.launches[0].stop), graph, apart
        ),
    }


def save(
    path: Path,
    model: Model,
    schedule: Schedule,
    device: str = "cpu",
    device_sms: int | None = None,
    precision: Precision | None = None,
) -> str:
    """A schedule file's path, as configurations have it; by default in the precision that the device has by default."""
    header = Header(
        model_fingerprint=fingerprint(*model.layers),
        precision=precision or (FLOAT32 if device == "cpu" else BFLOAT16),
        device=device,
        device_sms=device_sms,
        tensor_parallel=1,
        dense_batch_tokens=schedule.tokens,
    )
    ScheduleFile(header=header, plans=(schedule,)).save(path)
    return str(path)


def without_wait(schedule: Schedule, number: int, wait: Wait) -> Schedule:
    launch = schedule.launches[number]
    launch = replace(launch, waits=tuple(other for other in launch.waits if other != wait))
    return replace(schedule, launches=(*schedule.launches[:number], launch, *schedule.launches[number + 1 :]))


def random_schedule(graph: Graph, tokens: int, rng: random.Random, max_parts: int = 3, max_lanes: int = 4) -> Schedule:
    """Every operation cut at its own places, in a random legal order and random lanes, some of it a layer ahead."""
    launches = []
    lanes = [f"lane {i}" for i in range(rng.randint(1, max_lanes))]
    for op in graph.operations:
        cuts = sorted(rng.sample(range(1, tokens), rng.randint(0, min(max_parts, tokens) - 1)))
        for start, stop in pairwise([0, *cuts, tokens]):
            launches.append(Launch(operation=op.name, start=start, stop=stop, lane=rng.choice(lanes)))
    needed = dependencies(graph, [x.nano for x in launches])
    same_layer = [{d.writer for d in deps if not d.layers_back} for deps in needed]
    layer_before = [{d.writer for d in deps if d.layers_back} for deps in needed]
    leading = set(shuffled(same_layer, rng)[: rng.choice([0, 0, rng.randint(0, len(launches) // 2)])])
    # In one period what leads is of the next layer, and follows the rest of the layer before; all else that a launch
    # needs was issued in an earlier period.
    period = [
        (deps & leading) | (before - leading) if i in leading else deps - leading
        for i, (deps, before) in enumerate(zip(same_layer, layer_before, strict=True))
    ]
    ordered = [replace(launches[i], layers_ahead=int(i in leading)) for i in shuffled(period, rng)]
    return synchronise(Schedule(tokens=tokens, launches=tuple(ordered)), graph)


def shuffled(after: list[set[int]], rng: random.Random) -> list[int]:
    """0 .. n - 1 in a random order in which each i follows all of after[i]."""
    done: list[int] = []
    while len(done) < len(after):
        done.append(rng.choice([i for i in range(len(after)) if i not in done and after[i] <= set(done)]))
    return done


def interleavings(order: PartialOrder) -> Iterator[list[int]]:
    """Every order of the steps that lanes and waits allow."""
    after = [sum(1 << j for j in set(direct)) for direct in order.direct]

    def ready(mask: int) -> Iterator[int]:
        return iter([step for step, direct in enumerate(after) if not mask >> step & 1 and direct & ~mask == 0])

    done, mask, choices = [], 0, [ready(0)]
    while choices:
        step = next(choices[-1], None)
        if step is None:
            choices.pop()
            mask &= ~(1 << done.pop()) if done else 0
            continue
        done.append(step)
        mask |= 1 << step
        if len(done) == len(after):
            yield list(done)
        choices.append(ready(mask))


def random_interleaving(order: PartialOrder, rng: random.Random) -> list[int]:
    return shuffled([set(direct) for direct in order.direct], rng)


def delayed(order: PartialOrder, step: int) -> list[int]:
    """The interleaving in which `step` starts as late as it may: a launch that does not wait for it runs before."""
    late = [k for k in range(len(order.steps)) if k == step or order.precedes(step, k)]
    return [k for k in range(len(order.steps)) if k not in late] + late
