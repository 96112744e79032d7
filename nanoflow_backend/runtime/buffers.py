"""BufferPlan lets values that are never live together share memory. It is ints only; each program allocates its own.

Liveness is judged by the partial order of lanes and waits, not by the order of issue: two lanes may run apart.
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


class LayerValue(NamedTuple):
    """A value as one layer writes it. Layer -1 is the embedding: it writes what layer 0 takes as carried inputs."""

    layer: int
    name: str  # as in the layer's graph


class Use(NamedTuple):
    """A step reads or writes a value in the segments start .. stop - 1."""

    value: LayerValue
    start: int
    stop: int


@dataclass(frozen=True)
class ValueUses:
    """What each step of an unrolled schedule touches.

    Segment i is the tokens boundaries[i] .. boundaries[i + 1] - 1: no launch begins or ends inside one, so it is
    touched as a whole. `Schedule.fit` is monotone: segments that shrink with the batch stay disjoint.
    """

    boundaries: tuple[int, ...]
    reads: tuple[tuple[Use, ...], ...]
    writes: tuple[tuple[Use, ...], ...]


class Room(NamedTuple):
    """Values of one dtype share buffers, vectors among themselves: theirs are contiguous, those of rows are padded."""

    dtype: str
    is_vector: bool


@dataclass(frozen=True)
class Buffer:
    """One row a token; a value narrower than `width` lies in the first columns."""

    width: int
    dtype: str  # as in Value

    @property
    def room(self) -> Room:
        """What it has room for: values of one room may share a buffer."""
        return Room(self.dtype, self.is_vector)

    @property
    def is_vector(self) -> bool:
        """A single column, contiguous."""
        return self.width == 1


@dataclass(frozen=True)
class BufferPlan:
    """Which buffer holds each value of a schedule, and how large the buffers are."""

    buffers: tuple[Buffer, ...]
    holder: Mapping[LayerValue, int]  # the buffer of each value that has rows

    def row_bytes(self, precision: Precision) -> int:
        """Bytes a token of all buffers."""
        return sum(buffer.width * precision.element_bytes(buffer.dtype) for buffer in self.buffers)


def layer_value(graph: Graph, layer: int, value: str) -> LayerValue:
    """Which layer's value `layer` means by the name `value`."""
    return LayerValue(layer - 1, graph.carried[value]) if value in graph.carried else LayerValue(layer, value)


def uses(layers: Sequence[Graph], schedule: Schedule, steps: list[tuple[int, int]]) -> ValueUses:
    """The reads and writes of `steps` (layer, launch number), without the inputs that are the same for every layer.

    `layers` are the graphs of all layers in order. A launch whose operation the layer does not have touches nothing.
    """
    ends = {end for launch in schedule.launches for end in (launch.start, launch.stop)}
    boundaries = tuple(sorted(ends | {0, schedule.tokens}))
    segment = {boundary: i for i, boundary in enumerate(boundaries)}
    outside = set(layers[0].inputs) - layers[0].carried.keys()

    def use(layer: int, value: str, start: int, stop: int) -> Use:
        return Use(layer_value(layers[layer], layer, value), segment[start], segment[stop])

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
    return ValueUses(boundaries, tuple(reads), tuple(writes))


def plan_buffers(layers: Sequence[Graph], schedule: Schedule, aliases: Mapping[str, str] | None = None) -> BufferPlan:
    """Give every value of every layer a buffer, in the order in which they are first touched.

    `layers` are the graphs of all layers in order.

    This is linear-scan register allocation over a partial order. Two values interfere in a segment of their rows unless
    every write of the later one happens after every access to the earlier one; values that do not interfere may share a
    buffer. The embedding precedes every launch, and the head follows them all. `aliases` names outputs of operations
    that nobody runs, each with the input that it is.
    """
    aliases = aliases or {}

    def alias_root(value: LayerValue) -> LayerValue:
        name = value.name
        while name in aliases:
            name = aliases[name]
        return LayerValue(value.layer, name)

    num_layers, carried = len(layers), layers[0].carried.values()
    order = PartialOrder(schedule, num_layers)
    used = uses(layers, schedule, order.steps)
    segments = len(used.boundaries) - 1
    live_ranges = {alias_root(LayerValue(-1, name)): _LiveRange(segments) for name in carried}
    for k in range(len(order.steps)):
        for use in used.reads[k] + used.writes[k]:
            live_ranges.setdefault(alias_root(use.value), _LiveRange(segments)).touch(use, 1 << k)
        for use in used.writes[k]:
            if use.value.name not in aliases:
                live_ranges[use.value].written[use.start : use.stop] = [order.before[k]] * (use.stop - use.start)
    for name in carried:
        result = LayerValue(num_layers - 1, name)
        # The head is a step that nothing follows.
        live_ranges[alias_root(result)].touch(Use(result, 0, segments), 1 << len(order.steps))

    buffers: list[Buffer] = []
    contents: list[_LiveRange] = []
    holder: dict[LayerValue, int] = {}
    for value, live in live_ranges.items():
        declared = layers[max(value.layer, 0)].values[value.name]
        if declared.kind is not Kind.TOKENS:
            continue
        wanted = Buffer(declared.width, declared.dtype)
        free = [b for b, buffer in enumerate(buffers) if buffer.room == wanted.room and live.follows(contents[b])]
        if free:  # the one that grows least, and of those the narrowest
            chosen = min(free, key=lambda b: (max(declared.width - buffers[b].width, 0), buffers[b].width))
        else:
            chosen = len(buffers)
            buffers.append(wanted)
            contents.append(_LiveRange(segments))
        buffers[chosen] = Buffer(max(declared.width, buffers[chosen].width), declared.dtype)
        contents[chosen].touched = [a | b for a, b in zip(contents[chosen].touched, live.touched, strict=True)]
        holder[value] = chosen
    also = [LayerValue(layer, name) for layer in range(-1, num_layers) for name in aliases]
    holder |= {value: holder[alias_root(value)] for value in also if alias_root(value) in holder}
    return BufferPlan(tuple(buffers), holder)


def merge_plans(plans: Sequence[BufferPlan]) -> list[BufferPlan]:
    """The same plans on common buffers, since no two of them run at the same time.

    The widest buffers of a dtype, one of each plan, become one, then the second widest, and so on; vectors apart.
    """
    widths: dict[tuple[Room, int], int] = {}  # (room, place among those of it by width)
    places: list[dict[int, tuple[Room, int]]] = []
    for plan in plans:
        places.append({})
        for b in sorted(range(len(plan.buffers)), key=lambda b: -plan.buffers[b].width):
            room = plan.buffers[b].room
            place = room, sum(other == room for other, _ in places[-1].values())
            places[-1][b] = place
            widths[place] = max(widths.get(place, 0), plan.buffers[b].width)
    number = {place: i for i, place in enumerate(widths)}
    buffers = tuple(Buffer(width, room.dtype) for (room, _), width in widths.items())
    return [
        BufferPlan(buffers, {value: number[at[b]] for value, b in plan.holder.items()})
        for plan, at in zip(plans, places, strict=True)
    ]


class _LiveRange:
    """By segment, as masks of steps: who touches a value, and who has ended before it is written."""

    def __init__(self, segments: int) -> None:
        self.touched = [0] * segments
        self.written = [0] * segments

    def touch(self, use: Use, step: int) -> None:
        for segment in range(use.start, use.stop):
            self.touched[segment] |= step

    def follows(self, contents: _LiveRange) -> bool:
        """Whether each write of the value comes after whatever touched `contents`: they do not interfere."""
        return not any(before & ~mine for before, mine in zip(contents.touched, self.written, strict=True))
