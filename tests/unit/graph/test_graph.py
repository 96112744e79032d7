"""The op graph: what the builder makes, and what nano-operations depend on."""

import random
from itertools import pairwise

import pytest
from support.models.shapes import WITH_NORMS, config

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.graph.builder import GraphBuilder, local_shape
from nanoflow_backend.graph.nano_batch import Dependency, NanoOperation, dependencies
from nanoflow_backend.graph.operation import Kind, Source
from nanoflow_backend.models.model import build


@pytest.mark.parametrize("name", WITH_NORMS)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_graphs_are_in_a_legal_order_and_carry_the_hidden_state(name: str, tp: int) -> None:
    model = build(config(name), tp)
    for graph in (model.embed, model.layer, model.head):
        written = set(graph.inputs)
        for op in graph.operations:
            assert set(op.inputs) <= written, op.name
            assert set(op.parameters) <= {p.name for p in graph.parameters}, op.name
            written |= set(op.outputs)
        assert set(graph.outputs) <= written
    carried = model.layer.carried
    assert list(carried) == ["residual", "update"]
    for value, output in carried.items():
        assert model.layer.values[value].width == model.layer.values[output].width == 16
    assert model.vocab_size == 67
    assert model.layer.values["pages"].kind is Kind.PAGES


@pytest.mark.parametrize("name", WITH_NORMS)
def test_ranks_share_heads_and_columns(name: str) -> None:
    for tp in (1, 2, 4, 8):
        shapes = {p.name: p.shape for p in build(config(name), tp).layer.parameters}
        kv_heads = max(2 // tp, 1)  # fewer kv heads than ranks are copied
        assert shapes["qkv.weight"] == ((8 // tp + 2 * kv_heads) * 4, 16)
        assert shapes["o.weight"] == (16, 32 // tp)
        inner = -(-37 // tp)  # columns that do not divide evenly are padded
        experts = (8,) if config(name).num_experts else ()
        assert shapes["gate_up.weight"] == (*experts, 2 * inner, 16)
        assert shapes["down.weight"] == (*experts, 16, inner)


def test_local_shape_pads_units_and_never_cuts_them() -> None:
    assert local_shape(Source("x", (10, 3), shard=0), 4) == (3, 3)
    assert local_shape(Source("x", (12, 3), shard=0, units=3), 2) == (8, 3)
    assert local_shape(Source("x", (12, 3), shard=0, units=3), 8) == (4, 3)
    assert local_shape(Source("x", (10, 3)), 4) == (10, 3)


def test_heads_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel: expected a divisor of num_attention_heads 6, got 4"):
        build(config("llama", num_heads=6), 4)
    with pytest.raises(ConfigError, match=r"tensor_parallel: .* multiple of num_key_value_heads 3, got 2"):
        build(config("llama", num_heads=6, num_kv_heads=3), 2)


def test_a_value_has_one_writer() -> None:
    g = GraphBuilder()
    x, weight = g.input("x", 4), g.weight("w", Source("w", (4, 4)))
    g.linear("y", x, weight)
    with pytest.raises(ValueError, match="value 'y' is written twice"):
        g.linear("y", x, weight)


@pytest.mark.parametrize("name", WITH_NORMS)
def test_dependencies_are_those_of_single_tokens(name: str) -> None:
    """Against a simulation that knows single rows: who wrote each (value, token) that a token's operation reads."""
    graph, tokens = build(config(name)).layer, 6
    for seed in range(20):
        rng = random.Random(seed)
        nanos = []
        for op in graph.operations:
            cuts = sorted(rng.sample(range(1, tokens), rng.randint(0, 3)))
            nanos += [NanoOperation(op.name, *cut) for cut in pairwise([0, *cuts, tokens])]
        writer = {
            (value, token): index
            for index, nano in enumerate(nanos)
            for value in graph[nano.operation].outputs
            for token in range(nano.start, nano.stop)
        }
        for nano, found in zip(nanos, dependencies(graph, nanos), strict=True):
            expected = set()
            for value in graph[nano.operation].inputs:
                source = {"residual": "mlp_norm.residual", "update": "mlp_reduce"}.get(value, value)
                for token in range(nano.start, nano.stop):
                    # A request may begin at any earlier token, so attention may read the K and V of all of those.
                    read = range(token + 1) if value == "pages" else [token]
                    expected |= {
                        Dependency(writer[source, t], int(source != value)) for t in read if (source, t) in writer
                    }
            assert found == sorted(expected), nano
