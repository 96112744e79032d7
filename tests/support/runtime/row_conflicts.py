"""What a buffer plan may do wrong, from every access to every row: slow, and apart from how plans are made."""

from __future__ import annotations

from functools import cache
from itertools import combinations

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.runtime.buffers import BufferPlan, LayerValue
from nanoflow_backend.schedule.plan import Schedule

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
) -> dict[LayerValue, list[tuple[int, bool, int]]]:
    """(step, writes, row) of every instance, when a batch has `tokens`."""
    found: dict[LayerValue, list[tuple[int, bool, int]]] = {}
    ranges = schedule.fit(tokens)
    carried = {"residual": "mlp_norm.residual", "update": "mlp_reduce"}
    for value in carried.values():
        found[LayerValue(-1, value)] = [(EMBEDDING, True, row) for row in range(tokens)]
    for k, (layer, number) in enumerate(schedule.unroll(num_layers)):
        operation = graph[schedule.launches[number].operation]
        for row in range(*ranges[number]):
            for value in operation.inputs:
                instance = LayerValue(layer - 1, carried[value]) if value in carried else LayerValue(layer, value)
                found.setdefault(instance, []).append((k, False, row))
            for value in operation.outputs:
                found.setdefault(LayerValue(layer, value), []).append((k, True, row))
    for value in carried.values():
        found[LayerValue(num_layers - 1, value)] += [(HEAD, False, row) for row in range(tokens)]
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
