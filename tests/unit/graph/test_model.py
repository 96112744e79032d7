"""A model of several kinds of layers, and what a schedule of it covers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.models.layer_kinds import alternating
from support.models.shapes import CONFIGS, config

from nanoflow_backend.graph.model import Model, union
from nanoflow_backend.graph.nano_batch import dependencies
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import fingerprint
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate

MIXED = alternating()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_whose_layers_are_alike_has_one_kind(name: str) -> None:
    model = build(config(name, num_layers=4))
    assert (len(model.layers), model.kind_of, model.num_layers) == (1, (0, 0, 0, 0), 4)
    assert model.layer is model.layers[0]
    assert model.with_layers(2).in_order == model.layers * 2


def test_kinds_take_turns() -> None:
    assert MIXED.kind_of == (0, 1, 0, 1, 0)
    assert [("router" in graph) for graph in MIXED.in_order] == [False, True, False, True, False]
    assert MIXED.with_layers(7).kind_of == (0, 1, 0, 1, 0, 0, 1)


def test_a_schedule_sees_the_operations_of_all_kinds_in_an_order_that_is_legal_for_each() -> None:
    names = [op.name for op in MIXED.layer.operations]
    for graph in MIXED.layers:
        of_kind = [op.name for op in graph.operations]
        assert [name for name in names if name in of_kind] == of_kind
    assert set(names) == {op.name for graph in MIXED.layers for op in graph.operations}


def test_dependencies_of_the_union_are_those_of_every_kind() -> None:
    launches = [launch.nano for launch in nano_batched(MIXED.layer, 16, 3).launches]
    of_union = dependencies(MIXED.layer, launches)
    for graph in MIXED.layers:
        mine = [i for i, nano in enumerate(launches) if nano.operation in graph]
        for i, found in zip(mine, dependencies(graph, [launches[i] for i in mine]), strict=True):
            assert {(mine[d.writer], d.layers_back) for d in found} <= set(of_union[i])


def test_a_schedule_of_one_kind_alone_is_refused() -> None:
    validate(sequential(MIXED.layer, 16), MIXED.layer, MIXED.num_layers)
    with pytest.raises(ScheduleError, match=r"router: tokens 0\.\.16 are never computed"):
        validate(sequential(MIXED.layers[0], 16), MIXED.layer, MIXED.num_layers)


def test_the_fingerprint_sees_every_kind() -> None:
    dense, experts = MIXED.layers
    assert len({fingerprint(dense), fingerprint(experts), fingerprint(dense, experts)}) == 3


def test_kinds_that_cannot_follow_each_other_are_refused() -> None:
    dense, experts = MIXED.layers
    with pytest.raises(ValueError, match="values of the same names"):
        replace(MIXED, layers=(dense, replace(experts, outputs=experts.outputs[::-1])))
    with pytest.raises(ValueError, match=r"kind_of: expected kinds in 0\.\.1"):
        replace(MIXED, kind_of=(0, 2))
    with pytest.raises(ValueError, match="one or more layers"):
        Model(MIXED.embed, MIXED.layers, (), MIXED.head)


def test_operations_in_opposite_orders_have_no_union() -> None:
    dense = MIXED.layers[0]
    backwards = Graph(dense.operations[::-1], dense.values, dense.inputs, dense.outputs, dense.parameters)
    with pytest.raises(ValueError, match="opposite orders"):
        union([dense, backwards])
