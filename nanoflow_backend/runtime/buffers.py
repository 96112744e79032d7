"""BufferPlan: values that are never alive together share memory. Ints only; each program allocates for itself.

"Together" is judged by the partial order of lanes and waits, not by the order of issue: two lanes may run apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.nano_batch import rows_read
from nanoflow_backend.graph.operation import Graph, Kind
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Schedule


class Instance(NamedTuple):
    """A value as one layer writes it. Layer -1 is the embedding: it writes what layer 0 takes as carried inputs."""

    layer: int
    value: str


class Use(NamedTuple):
    """A step reads or writes an instance in the segments start .. stop - 1."""

    instance: Instance
    start: int
    stop: int


@dataclass(frozen=True)
class Uses:
    """What each step of an unrolled schedule touches.

    Segment i is the tokens boundaries[i] .. boundaries[i + 1] - 1: no launch begins or ends inside one, so it is
    touched as a whole. `Schedule.fit` is monotone: segments that shrink with the batch stay disjoint.
    """

    boundaries: tuple[int, ...]
    reads: tuple[tuple[Use, ...], ...]
    writes: tuple[tuple[Use, ...], ...]


@dataclass(frozen=True)
class Buffer:
    """One row a token; an instance narrower than `width` lies in the first columns."""

    width: int
    dtype: str  # as in Value


@dataclass(frozen=True)
class BufferPlan:
    buffers: tuple[Buffer, ...]
    holder: Mapping[Instance, int]  # the buffer of each instance that has rows

    def row_bytes(self, precision: Precision) -> int:
        """Bytes a token of all buffers."""
        return sum(buffer.width * precision.element_bytes(buffer.dtype) for buffer in self.buffers)


def instance_of(graph: Graph, layer: int, value: str) -> Instance:
    """Which instance `layer` means by `value`."""
    return Instance(layer - 1, graph.carried[value]) if value in graph.carried else Instance(layer, value)


def uses(layers: Sequence[Graph], schedule: Schedule, steps: list[tuple[int, int]]) -> Uses:
    """The reads and writes of `steps` (layer, launch number), without the inputs that are the same for every layer.

    `layers` are the graphs of all layers in order. A launch whose operation the layer does not have touches nothing.
    """
    ends = {end for launch in schedule.launches for end in (launch.start, launch.stop)}
    boundaries = tuple(sorted(ends | {0, schedule.tokens}))
    segment = {boundary: i for i, boundary in enumerate(boundaries)}
    outside = set(layers[0].inputs) - layers[0].carried.keys()

    def use(layer: int, value: str, start: int, stop: int) -> Use:
        return Use(instance_of(layers[layer], layer, value), segment[start], segment[stop])

    reads: list[tuple[Use, ...]] = []
    writes: list[tuple[Use, ...]] = []
    for layer, number in steps:
        nano, graph = schedule.launches[number].nano, layers[layer]
        if nano.operation not in graph:
            reads.append(())
            writes.append(())
            continue
        operation = graph[nano.operation]
        reads.append(tuple(use(layer, v, *rows_read(graph, v, nano)) for v in operation.inputs if v not in outside))
        writes.append(tuple(use(layer, v, nano.start, nano.stop) for v in operation.outputs))
    return Uses(boundaries, tuple(reads), tuple(writes))


def plan_buffers(
    layers: Sequence[Graph], schedule: Schedule, same: Mapping[str, str] | None = None
) -> BufferPlan:
    """Give every instance a buffer, in the order in which they are first touched. `layers`: the graphs in order.

    An instance may move into a buffer when each of its writes is certain to follow whatever touched the same
    segment of that buffer before. The embedding precedes every launch, and the head follows them all. `same` names
    outputs of operations that nobody runs, each with the input that it is.
    """
    same = same or {}

    def home(instance: Instance) -> Instance:
        value = instance.value
        while value in same:
            value = same[value]
        return Instance(instance.layer, value)

    num_layers, carried = len(layers), layers[0].carried.values()
    order = PartialOrder(schedule, num_layers)
    used = uses(layers, schedule, order.steps)
    segments = len(used.boundaries) - 1
    lives = {home(Instance(-1, name)): _Life(segments) for name in carried}
    for k in range(len(order.steps)):
        for use in used.reads[k] + used.writes[k]:
            lives.setdefault(home(use.instance), _Life(segments)).touch(use, 1 << k)
        for use in used.writes[k]:
            if use.instance.value not in same:
                lives[use.instance].written[use.start : use.stop] = [order.before[k]] * (use.stop - use.start)
    for name in carried:
        result = Instance(num_layers - 1, name)
        lives[home(result)].touch(Use(result, 0, segments), 1 << len(order.steps))  # a step that nothing follows

    buffers: list[Buffer] = []
    contents: list[_Life] = []
    holder: dict[Instance, int] = {}
    for instance, life in lives.items():
        value = layers[max(instance.layer, 0)].values[instance.value]
        if value.kind is not Kind.TOKENS:
            continue
        free = [b for b, buffer in enumerate(buffers) if buffer.dtype == value.dtype and life.follows(contents[b])]
        if free:  # the one that grows least, and of those the narrowest
            chosen = min(free, key=lambda b: (max(value.width - buffers[b].width, 0), buffers[b].width))
        else:
            chosen = len(buffers)
            buffers.append(Buffer(value.width, value.dtype))
            contents.append(_Life(segments))
        buffers[chosen] = Buffer(max(value.width, buffers[chosen].width), value.dtype)
        contents[chosen].touched = [a | b for a, b in zip(contents[chosen].touched, life.touched, strict=True)]
        holder[instance] = chosen
    also = [Instance(layer, value) for layer in range(-1, num_layers) for value in same]
    holder |= {instance: holder[home(instance)] for instance in also if home(instance) in holder}
    return BufferPlan(tuple(buffers), holder)


def shared(plans: Sequence[BufferPlan]) -> list[BufferPlan]:
    """The same plans on common buffers, since no two of them run at the same time.

    The widest buffers of a dtype, one of each plan, become one, then the second widest, and so on.
    """
    widths: dict[tuple[str, int], int] = {}  # (dtype, place among its dtype's by width)
    places: list[dict[int, tuple[str, int]]] = []
    for plan in plans:
        places.append({})
        for b in sorted(range(len(plan.buffers)), key=lambda b: -plan.buffers[b].width):
            dtype = plan.buffers[b].dtype
            place = dtype, sum(other == dtype for other, _ in places[-1].values())
            places[-1][b] = place
            widths[place] = max(widths.get(place, 0), plan.buffers[b].width)
    number = {place: i for i, place in enumerate(widths)}
    buffers = tuple(Buffer(width, dtype) for (dtype, _), width in widths.items())
    return [
        BufferPlan(buffers, {instance: number[at[b]] for instance, b in plan.holder.items()})
        for plan, at in zip(plans, places, strict=True)
    ]


class _Life:
    """By segment, as masks of steps: who touches an instance, and who has ended before it is written."""

    def __init__(self, segments: int) -> None:
        self.touched = [0] * segments
        self.written = [0] * segments

    def touch(self, use: Use, step: int) -> None:
        for segment in range(use.start, use.stop):
            self.touched[segment] |= step

    def follows(self, contents: _Life) -> bool:
        """Is each of our writes certain to come after whatever touched `contents`?"""
        return not any(before & ~mine for before, mine in zip(contents.touched, self.written, strict=True))
