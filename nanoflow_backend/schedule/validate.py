"""validate proves that a schedule computes what the graph says, whatever the speed of its lanes."""

from __future__ import annotations

from itertools import pairwise

from nanoflow_backend.graph.nano_batch import dependencies
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Launch, Schedule, ScheduleError

ROUNDING = 1e-6  # of shares that are 1 together
# A plan of 16 nano-batches has some 200 launches. What has certainly ended before a step is a bit mask of all steps, so
# validation takes the square of them in bits: at most 64 MiB.
MOST_LAUNCHES = 1024  # of a layer
MOST_STEPS = 2**15  # launches of all layers
MOST_WAITS = 2**17  # of all layers


def validate(
    schedule: Schedule, graph: Graph, num_layers: int, device_sms: int | None = None, *, ranks: int = 1
) -> None:
    """Check `schedule` against a layer's `graph` (its all-reduces already in the schedule's form).

    Raises:
        ScheduleError: naming the launch and the rule: an operation covers every token once, ranges keep to the
            granularity, every dependency (by token range, and through the KV pages) is ordered by lanes and waits,
            SM shares keep inside a declared partition, groups hold every row and decode, what a rank has its own rows
            of is read in the ranges that it was written in, and several ranks run their collectives in one order.
    """
    _check_size(schedule, num_layers)
    for number, launch in enumerate(schedule.launches):
        _check_launch(number, launch, schedule, graph, num_layers)
    _check_coverage(schedule, graph)
    _check_partition(schedule, device_sms)
    _check_groups(schedule)
    _check_own_rows(schedule, graph)
    order = PartialOrder(schedule, num_layers)
    _check_dependencies(schedule, graph, order)
    if ranks > 1:
        _check_collectives(schedule, graph, order)


def describe(number: int, launch: Launch) -> str:
    return f"launch {number} ({launch.operation} {launch.start}..{launch.stop})"


def _check_size(schedule: Schedule, num_layers: int) -> None:
    launches = len(schedule.launches)
    if launches > MOST_LAUNCHES:
        raise ScheduleError(f"launches: expected at most {MOST_LAUNCHES}, got {launches}")
    waits = sum(len(launch.waits) for launch in schedule.launches)
    for name, count, most in (("launches", launches, MOST_STEPS), ("waits", waits, MOST_WAITS)):
        if count * num_layers > most:
            raise ScheduleError(
                f"{name}: expected at most {most} in all layers together, got {count} in each of {num_layers}"
            )


def _check_launch(number: int, launch: Launch, schedule: Schedule, graph: Graph, num_layers: int) -> None:
    where = describe(number, launch)
    if launch.operation not in {op.name for op in graph.operations}:
        raise ScheduleError(f"{where}: the model has no such operation; it has {[op.name for op in graph.operations]}")
    if not 0 <= launch.start < launch.stop <= schedule.tokens:
        raise ScheduleError(f"{where}: expected a non-empty range inside 0..{schedule.tokens}")
    for boundary in (launch.start, launch.stop):
        if boundary % schedule.granularity and boundary != schedule.tokens:
            raise ScheduleError(f"{where}: {boundary} is not a multiple of the granularity {schedule.granularity}")
    if not 0 <= launch.layers_ahead <= num_layers:
        raise ScheduleError(f"{where}: layers_ahead is {launch.layers_ahead}, expected 0..{num_layers} (layers)")
    for wait in launch.waits:
        if not 0 <= wait.launch < len(schedule.launches) or wait.layers_back < 0:
            raise ScheduleError(
                f"{where}: there is no launch {wait.launch}, {wait.layers_back} layers back, to wait for"
            )


def _check_coverage(schedule: Schedule, graph: Graph) -> None:
    for op in graph.operations:
        covered = 0
        for start, stop in sorted((x.start, x.stop) for x in schedule.launches if x.operation == op.name):
            if start != covered:
                fault = "covered twice" if start < covered else "never computed"
                raise ScheduleError(f"{op.name}: tokens {min(start, covered)}..{max(start, covered)} are {fault}")
            covered = stop
        if covered != schedule.tokens:
            raise ScheduleError(f"{op.name}: tokens {covered}..{schedule.tokens} are never computed")


def _check_partition(schedule: Schedule, device_sms: int | None) -> None:
    if unknown := schedule.partition.keys() - set(schedule.lanes):
        raise ScheduleError(f"partition: no launch is in lane {sorted(unknown)}")
    if schedule.partition and (missing := set(schedule.lanes) - schedule.partition.keys()):
        raise ScheduleError(f"partition: lane {sorted(missing)} has no SMs of its own")
    for lane, sms in schedule.partition.items():
        if sms < 1:
            raise ScheduleError(f"partition: lane {lane!r} owns {sms} SMs, expected at least 1")
    owned = sum(schedule.partition.values())
    if device_sms is not None and owned > device_sms:
        raise ScheduleError(f"partition: its lanes own {owned} SMs, the device has {device_sms}")
    for number, launch in enumerate(schedule.launches):
        limit = schedule.partition.get(launch.lane, device_sms)
        if launch.sms is not None and not 1 <= launch.sms <= (limit or launch.sms):
            raise ScheduleError(f"{describe(number, launch)}: sms is {launch.sms}, expected 1..{limit}")


def _check_groups(schedule: Schedule) -> None:
    groups = schedule.groups
    if not groups:
        return
    stops = [group.stop for group in groups]
    if stops[0] < 1 or stops != sorted(set(stops)) or stops[-1] != schedule.tokens:
        raise ScheduleError(f"groups: expected ascending stops from 1 to {schedule.tokens}, got {stops}")
    if off := [stop for stop in stops[:-1] if stop % schedule.granularity]:
        raise ScheduleError(f"groups: stop {off[0]} is not a multiple of the granularity {schedule.granularity}")
    shares = [group.decodes for group in groups]
    if min(shares) < 0 or not abs(sum(shares) - 1) <= ROUNDING:
        raise ScheduleError(f"groups: expected shares of the decodes, 0 or more and 1 together, got {shares}")


def _check_own_rows(schedule: Schedule, graph: Graph) -> None:
    """Which rows are a rank's follows from a launch's range: another range would be read where other ranks wrote."""
    ranges = {
        op.name: {(x.start, x.stop) for x in schedule.launches if x.operation == op.name} for op in graph.operations
    }
    for reader in graph.operations:
        for value in set(reader.inputs) & set(reader.own_rows):
            source = graph.carried.get(value, value)
            for writer in graph.operations:
                if (
                    source in writer.outputs
                    and source in writer.own_rows
                    and ranges[writer.name] != ranges[reader.name]
                ):
                    raise ScheduleError(
                        f"{reader.name}: expected the token ranges of {writer.name}, {_said(ranges[writer.name])}, of "
                        f"each of which a rank has its own rows of {source!r}; got {_said(ranges[reader.name])}"
                    )


def _said(ranges: set[tuple[int, int]]) -> str:
    return ", ".join(f"{start}..{stop}" for start, stop in sorted(ranges))


def _check_collectives(schedule: Schedule, graph: Graph, order: PartialOrder) -> None:
    """Ranks meet in collectives. Where two of them may run in either order, one rank may begin with the one and another
    rank with the other, and both wait for ever."""
    network = {op.name for op in graph.operations if op.resource is Resource.NETWORK}
    collectives = [k for k, (_, n) in enumerate(order.steps) if schedule.launches[n].operation in network]
    for first, second in pairwise(collectives):
        if not order.precedes(first, second):
            (layer, number), (other_layer, other) = order.steps[first], order.steps[second]
            raise ScheduleError(
                f"{describe(number, schedule.launches[number])} in layer {layer} and "
                f"{describe(other, schedule.launches[other])} in layer {other_layer} are collectives that may run in "
                f"either order: ranks would wait for each other; expected them in one lane, or a wait"
            )


def _check_dependencies(schedule: Schedule, graph: Graph, order: PartialOrder) -> None:
    needed = dependencies(graph, [launch.nano for launch in schedule.launches])
    for k, (layer, number) in enumerate(order.steps):
        for writer, layers_back in needed[number]:
            if layers_back <= layer and not order.precedes(order.index[layer - layers_back, writer], k):
                raise ScheduleError(
                    f"{describe(number, schedule.launches[number])} in layer {layer} may start before "
                    f"{describe(writer, schedule.launches[writer])} of layer {layer - layers_back} has ended: "
                    f"it reads what that one writes"
                )
