"""The buffer plan, against every pair of accesses to every row."""

import random
from itertools import combinations, zip_longest

import pytest
from support.models.shapes import CONFIGS, config
from support.runtime.row_conflicts import conflicts
from support.schedule.schedules import plans, random_schedule

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.buffers import Buffer, BufferPlan, LayerValue, merge_plans, plan_buffers
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential

LAYER = build(config("llama")).layer


def schedules(graph: Graph) -> list[Schedule]:
    return [*plans(graph, 9).values(), *(random_schedule(graph, 9, random.Random(i), max_lanes=6) for i in range(12))]


@pytest.mark.parametrize("name", CONFIGS)
def test_instances_that_share_never_meet(name: str) -> None:
    graph = build(config(name)).layer
    for schedule in schedules(graph):
        plan = plan_buffers((graph,) * 3, schedule)
        for tokens in (9, 7, 2):
            assert conflicts(plan, graph, schedule, 3, tokens) == []


@pytest.mark.parametrize("name", CONFIGS)
def test_every_instance_has_a_buffer_of_its_dtype_and_width(name: str) -> None:
    graph = build(config(name)).layer
    rows = {value.name for value in graph.values.values() if value.kind == "tokens"} - set(graph.inputs)
    for schedule in schedules(graph):
        plan = plan_buffers((graph,) * 3, schedule)
        expected = {LayerValue(layer, value) for layer in range(3) for value in rows}
        assert plan.holder.keys() == expected | {LayerValue(-1, value) for value in graph.outputs}
        for value, buffer in plan.holder.items():
            assert plan.buffers[buffer].dtype == graph.values[value.name].dtype
            assert plan.buffers[buffer].width >= graph.values[value.name].width


@pytest.mark.parametrize("name", CONFIGS)
def test_plans_share_buffers_and_none_of_them_meets_itself(name: str) -> None:
    graph = build(config(name)).layer
    made = schedules(graph)
    apart = [plan_buffers((graph,) * 3, schedule) for schedule in made]
    together = merge_plans(apart)
    assert len({plan.buffers for plan in together}) == 1
    for plan, alone, schedule in zip(together, apart, made, strict=True):
        assert conflicts(plan, graph, schedule, 3, 9) == []
        assert plan.holder.keys() == alone.holder.keys()
        for value, buffer in plan.holder.items():
            assert plan.buffers[buffer].dtype == graph.values[value.name].dtype
            assert plan.buffers[buffer].width >= graph.values[value.name].width
    for dtype in {buffer.dtype for buffer in together[0].buffers}:  # as many as the neediest plan has, as wide
        of_dtype = [sorted((b.width for b in plan.buffers if b.dtype == dtype), reverse=True) for plan in apart]
        needed = [max(widths) for widths in zip_longest(*of_dtype, fillvalue=0)]
        assert [buffer.width for buffer in together[0].buffers if buffer.dtype == dtype] == needed
    narrow, wide, x = Buffer(3, "float32"), Buffer(5, "float32"), LayerValue(0, "x")
    assert merge_plans([BufferPlan((narrow, wide), {x: 0})]) == [BufferPlan((wide, narrow), {x: 1})]


def test_the_brute_force_sees_a_forced_share() -> None:
    """Of all pairs of buffers that a plan keeps apart, none could have been one."""
    for schedule in plans(LAYER, 9).values():
        plan = plan_buffers((LAYER,) * 3, schedule)
        for kept, merged in combinations(range(len(plan.buffers)), 2):
            holder = {value: kept if b == merged else b for value, b in plan.holder.items()}
            assert conflicts(BufferPlan(plan.buffers, holder), LAYER, schedule, 3, 9)


def test_memory_does_not_grow_with_layers() -> None:
    """A model of Llama-2-70B's shape on 8 ranks: bytes a token against a buffer for every value."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128}
    model = build(config("llama", num_layers=80, **shape), 8)
    for schedule in (sequential(model.layer, 2048), nano_batched(model.layer, 2048, 4, 128)):
        plan = plan_buffers(model.in_order, schedule)
        values = (model.layer.values[value.name] for value in plan.holder)
        unshared = sum(value.width * BFLOAT16.element_bytes(value.dtype) for value in values)
        assert unshared == 11_624_448
        assert plan.row_bytes(BFLOAT16) == 65_536  # four rows of the hidden size
