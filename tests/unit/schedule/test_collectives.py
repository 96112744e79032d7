"""Collectives of several ranks: in which order all run them, and in which ranges rows are a rank's own."""

import random
from itertools import pairwise

import pytest
from msgspec.structs import replace
from support.models.shapes import config
from support.schedule.schedules import in_lanes, interleavings, random_schedule

from nanoflow_backend.graph.collectives import AllReduceForm, Forms, in_forms
from nanoflow_backend.graph.operation import Graph, Operation, Resource, Value
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.order import PartialOrder
from nanoflow_backend.schedule.plan import Schedule, ScheduleError, Wait
from nanoflow_backend.schedule.presets import alternating, nano_batched, sequential, synchronise
from nanoflow_backend.schedule.validate import validate

BOTH = ("attention_reduce", "mlp_reduce")
NORMED = dict.fromkeys(BOTH, AllReduceForm.NORMED)
FORMS: list[Forms] = [{}, dict.fromkeys(BOTH, AllReduceForm.SPLIT), {BOTH[0]: AllReduceForm.GATHERED}, NORMED]
LAYER = build(config("llama"), 2).layer


def two_reductions() -> Graph:
    """Two all-reduces of two products of one input: small enough for every interleaving."""
    values = {name: Value(name, 8) for name in ("x", "a", "b", "sum a", "sum b")}
    operations = (
        Operation("a", "linear", Resource.COMPUTE, ("x",), ("a",)),
        Operation("reduce a", "all_reduce", Resource.NETWORK, ("a",), ("sum a",)),
        Operation("b", "linear", Resource.COMPUTE, ("x",), ("b",)),
        Operation("reduce b", "all_reduce", Resource.NETWORK, ("b",), ("sum b",)),
    )
    return Graph(operations, values, ("x",), ("sum b",), ())


def orders_of_collectives(schedule: Schedule, graph: Graph, num_layers: int) -> set[tuple[int, ...]]:
    order = PartialOrder(schedule, num_layers)
    network = {
        k for k, (_, n) in enumerate(order.steps) if graph[schedule.launches[n].operation].resource is Resource.NETWORK
    }
    return {tuple(k for k in steps if k in network) for steps in interleavings(order)}


def test_a_schedule_is_refused_just_if_ranks_may_disagree_on_the_order() -> None:
    """Against all interleavings, of random schedules in random lanes."""
    graph, rng = two_reductions(), random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(150):
        schedule = random_schedule(graph, 4, rng, max_parts=2, max_lanes=3)
        one_order = len(orders_of_collectives(schedule, graph, 1)) == 1
        validate(schedule, graph, 1)  # one rank waits for nobody
        if one_order:
            validate(schedule, graph, 1, ranks=2)
        else:
            with pytest.raises(ScheduleError, match=r"launch \d+ \(reduce . \d\.\.\d\) in layer 0 and launch"):
                validate(schedule, graph, 1, ranks=2)
        seen[one_order] += 1
    assert min(seen.values()) > 20, seen


def test_collectives_in_two_lanes_need_waits() -> None:
    graph = in_forms(LAYER, FORMS[1], 2)
    plan = in_lanes(nano_batched(graph, 8, 2), graph, {"mlp_reduce.all_gather": "copies"})
    validate(plan, graph, 3)
    with pytest.raises(ScheduleError, match="are collectives that may run in either order: ranks would wait"):
        validate(plan, graph, 3, ranks=2)
    collectives = [i for i, x in enumerate(plan.launches) if graph[x.operation].resource is Resource.NETWORK]
    launches = list(plan.launches)
    for before, after in pairwise(collectives):
        launches[after] = replace(launches[after], waits=(*launches[after].waits, Wait(before)))
    launches[collectives[0]] = replace(
        launches[collectives[0]], waits=(*launches[collectives[0]].waits, Wait(collectives[-1], 1))
    )
    validate(replace(plan, launches=tuple(launches)), graph, 3, ranks=2)


@pytest.mark.parametrize("forms", FORMS, ids=["whole", "split", "gathered", "normed"])
def test_presets_run_collectives_in_a_lane_of_their_own(forms: Forms) -> None:
    graph = in_forms(LAYER, forms, 2)
    for plan in (sequential(graph, 8), nano_batched(graph, 8, 2), nano_batched(graph, 8, 3)):
        validate(plan, graph, 3, ranks=2)
    network = {x.operation for x in nano_batched(graph, 8, 2).launches if x.lane == "network"}
    assert network == {op.name for op in graph.operations if op.resource is Resource.NETWORK}


@pytest.mark.parametrize("forms", FORMS, ids=["whole", "split", "gathered", "normed"])
@pytest.mark.parametrize("partition", [{"network": 8, "compute": 124}, {"memory": 16, "network": 8, "compute": 108}])
def test_collectives_of_one_half_run_beside_products_of_the_other(forms: Forms, partition: dict[str, int]) -> None:
    graph, num_layers = in_forms(LAYER, forms, 2), 4
    plan = replace(alternating(graph, 512, 256, 0.5, partition), all_reduces=dict(forms))
    validate(plan, graph, num_layers, device_sms=132, ranks=2)
    assert set(plan.lanes) == partition.keys()
    order = PartialOrder(plan, num_layers)
    beside_nothing = set()
    for k, (layer, number) in enumerate(order.steps):
        launch = plan.launches[number]
        if launch.lane == "network" and 1 <= layer <= 2:
            free = [j for j in range(len(order.steps)) if not order.precedes(j, k) and not order.precedes(k, j)]
            others = {plan.launches[order.steps[j][1]] for j in free}
            if not any(x.start != launch.start and graph[x.operation].resource is Resource.COMPUTE for x in others):
                beside_nothing.add(launch.operation)
    within_a_half = {"attention_reduce.gather_input"} if AllReduceForm.GATHERED in forms.values() else set()
    assert beside_nothing == within_a_half


def test_alternating_needs_a_collective_to_take_turns_at() -> None:
    graph = two_reductions()
    with pytest.raises(ScheduleError, match="expected a graph with a collective between two products"):
        alternating(replace_operations(graph, graph.operations[:2]), 8, 4, 0.5, {"network": 8, "compute": 124})


def replace_operations(graph: Graph, operations: tuple[Operation, ...]) -> Graph:
    return Graph(operations, graph.values, graph.inputs, ("sum a",), ())


def test_own_rows_are_read_in_the_ranges_that_they_were_written_in() -> None:
    graph = in_forms(LAYER, NORMED, 2)
    whole, halves = nano_batched(graph, 8, 1), nano_batched(graph, 8, 2)
    for uncut in ("attention_reduce.normed", "mlp_reduce.normed"):
        launches = [
            x
            for op in graph.operations
            for x in (whole if op.name == uncut else halves).launches
            if x.operation == op.name
        ]
        plan = synchronise(replace(halves, launches=tuple(replace(x, waits=()) for x in launches)), graph)
        with pytest.raises(
            ScheduleError, match=r"_reduce\.normed: expected the token ranges of \w+\.normed, 0\.\.\d.*; got 0\.\."
        ):
            validate(plan, graph, 3, ranks=2)
    validate(halves, graph, 3, ranks=2)
