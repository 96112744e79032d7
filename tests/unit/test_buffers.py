"""The buffer plan, against every pair of accesses to every row."""

import random
from functools import cache
from itertools import combinations

import pytest
from schedules import in_lanes, random_schedule, rotated
from shapes import CONFIGS, config

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.buffers import BufferPlan, Instance, plan_buffers
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential

LAYER = build(config("llama")).layer
EMBEDDING, HEAD = -1, 10**6  # steps before and after all others


def ends_before(schedule: Schedule, num_layers: int) -> list[set[int]]:
    """By step, all that certainly ended before: a search over lanes and waits, apart from PartialOrder's masks."""
    steps = schedule.unroll(num_layers)

    @cache
    def ended(k: int) -> frozenset[int]:
        layer, number = steps[k]
        launch = schedule.launches[number]
        direct = {j for j in range(k) if schedule.launches[steps[j][1]].lane == launch.lane}
        direct |= {steps.index((layer - w.layers_back, w.launch)) for w in launch.waits if w.layers_back <= layer}
        return frozenset(direct).union(*(ended(j) for j in direct))

    return [set(ended(k)) for k in range(len(steps))]


def accesses(
    graph: Graph, schedule: Schedule, num_layers: int, tokens: int
) -> dict[Instance, list[tuple[int, bool, int]]]:
    """(step, writes, row) of every instance, when a batch has `tokens`."""
    found: dict[Instance, list[tuple[int, bool, int]]] = {}
    ranges = schedule.fit(tokens)
    carried = {"residual": "mlp_norm.residual", "update": "mlp_reduce"}
    for value in carried.values():
        found[Instance(-1, value)] = [(EMBEDDING, True, row) for row in range(tokens)]
    for k, (layer, number) in enumerate(schedule.unroll(num_layers)):
        operation = graph[schedule.launches[number].operation]
        for row in range(*ranges[number]):
            for value in operation.inputs:
                instance = Instance(layer - 1, carried[value]) if value in carried else Instance(layer, value)
                found.setdefault(instance, []).append((k, False, row))
            for value in operation.outputs:
                found.setdefault(Instance(layer, value), []).append((k, True, row))
    for value in carried.values():
        found[Instance(num_layers - 1, value)] += [(HEAD, False, row) for row in range(tokens)]
    return found


def conflicts(plan: BufferPlan, graph: Graph, schedule: Schedule, num_layers: int, tokens: int) -> list[str]:
    """Rows of a buffer in which two instances may meet: neither's last access certainly precedes the other's write."""
    before = ends_before(schedule, num_layers)
    found = accesses(graph, schedule, num_layers, tokens)

    def precedes(a: int, b: int) -> bool:
        return (a == EMBEDDING and b != EMBEDDING) or (b == HEAD and a != HEAD) or (0 <= b < HEAD and a in before[b])

    def follows(late: list[int], early: list[int]) -> bool:
        return all(precedes(a, b) for a in early for b in late)

    bad = []
    for a, b in combinations(plan.holder, 2):
        if plan.holder[a] != plan.holder[b]:
            continue
        for row in range(tokens):
            touch_a, touch_b = ([k for k, _, r in found[x] if r == row] for x in (a, b))
            write_a, write_b = ([k for k, w, r in found[x] if w and r == row] for x in (a, b))
            if not follows(write_b, touch_a) and not follows(write_a, touch_b):
                bad.append(f"{a} and {b} in row {row}")
    return bad


def schedules(graph: Graph) -> list[Schedule]:
    three = nano_batched(graph, 9, 3)
    return [
        sequential(graph, 9),
        three,
        in_lanes(three, graph, {"rope_append": "append", "attention": "attend", "down": "network"}),
        rotated(graph, three, ("attention_norm", "qkv"), 6),
        *(random_schedule(graph, 9, random.Random(seed), max_lanes=6) for seed in range(12)),
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_instances_that_share_never_meet(name: str) -> None:
    graph = build(config(name)).layer
    for schedule in schedules(graph):
        plan = plan_buffers(graph, schedule, 3)
        for tokens in (9, 7, 2):
            assert conflicts(plan, graph, schedule, 3, tokens) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_instance_has_a_buffer_of_its_dtype_and_width(name: str) -> None:
    graph = build(config(name)).layer
    rows = {value.name for value in graph.values.values() if value.kind == "tokens"} - set(graph.inputs)
    for schedule in schedules(graph):
        plan = plan_buffers(graph, schedule, 3)
        expected = {Instance(layer, value) for layer in range(3) for value in rows}
        assert plan.holder.keys() == expected | {Instance(-1, value) for value in graph.outputs}
        for instance, buffer in plan.holder.items():
            assert plan.buffers[buffer].dtype == graph.values[instance.value].dtype
            assert plan.buffers[buffer].width >= graph.values[instance.value].width


def test_the_brute_force_sees_a_forced_share() -> None:
    """Of all pairs of buffers that a plan keeps apart, none could have been one."""
    for schedule in schedules(LAYER)[:4]:
        plan = plan_buffers(LAYER, schedule, 3)
        for kept, merged in combinations(range(len(plan.buffers)), 2):
            holder = {instance: kept if b == merged else b for instance, b in plan.holder.items()}
            assert conflicts(BufferPlan(plan.buffers, holder), LAYER, schedule, 3, 9)


def test_memory_does_not_grow_with_layers() -> None:
    """A model of Llama-2-70B's shape on 8 ranks: bytes a token against a buffer for every value."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128}
    model = build(config("llama", num_layers=80, **shape), 8)
    dtype_bytes = {"activation": 2, "float32": 4, "int32": 4}
    for schedule in (sequential(model.layer, 2048), nano_batched(model.layer, 2048, 4, 128)):
        plan = plan_buffers(model.layer, schedule, 80)
        values = (model.layer.values[instance.value] for instance in plan.holder)
        unshared = sum(value.width * dtype_bytes[value.dtype] for value in values)
        assert unshared == 12_771_328
        assert plan.row_bytes(dtype_bytes) == 65_536  # four rows of the hidden size
