"""Model is the forward pass of one step as graphs: of the embedding, of each kind of layer, and of the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from nanoflow_backend.graph.operation import Graph, Operation, Value


@dataclass(frozen=True)
class Model:
    """`embed` runs once, then every layer in order, then `head` on the rows that are sampled.

    `layers` has one graph for each kind of layer, and layer i is of kind `kind_of[i]`. All kinds take and give values
    of the same names, so that any may follow any.

    Raises:
        ValueError: no layer, a kind that is not there, or kinds that cannot follow each other.
    """

    embed: Graph
    layers: tuple[Graph, ...]
    kind_of: tuple[int, ...]
    head: Graph

    def __post_init__(self) -> None:
        if not self.kind_of or not all(0 <= kind < len(self.layers) for kind in self.kind_of):
            raise ValueError(f"kind_of: expected kinds in 0..{len(self.layers) - 1} of one or more layers")
        for graph in self.layers:
            if (graph.inputs, graph.outputs) != (self.layers[0].inputs, self.layers[0].outputs):
                raise ValueError("layers: expected every kind to take and give values of the same names")

    @property
    def num_layers(self) -> int:
        return len(self.kind_of)

    @property
    def vocab_size(self) -> int:
        return self.embed.parameters[0].shape[0]

    @cached_property
    def in_order(self) -> tuple[Graph, ...]:
        """The graph of each layer."""
        return tuple(self.layers[kind] for kind in self.kind_of)

    @cached_property
    def layer(self) -> Graph:
        """A layer as schedules see it: the operations that a layer of any kind may have.

        A schedule covers all kinds: where a layer has no such operation, the launch does nothing there. Of a model
        whose layers are all alike, this is their graph.
        """
        return union(self.layers)

    def with_layers(self, num_layers: int) -> Model:
        """The same kinds of layers in the same turns, but so many of them."""
        return replace(self, kind_of=tuple(self.kind_of[i % self.num_layers] for i in range(num_layers)))


def union(kinds: Sequence[Graph]) -> Graph:
    """The operations of all `kinds` in an order that is legal for each, those of one name as one operation.

    That one reads and writes what it does in any of the kinds, so an order that respects the dependencies of the union
    respects those of every layer, whatever kind came before.

    Raises:
        ValueError: operations of one name that differ in resource, or come in opposite orders.
    """
    if len(kinds) == 1:
        return kinds[0]
    operations: dict[str, Operation] = {}
    before: dict[str, set[str]] = {}
    values: dict[str, Value] = {}
    for graph in kinds:
        for name, value in graph.values.items():
            if values.setdefault(name, value).kind is not value.kind:
                raise ValueError(f"value {name!r} is of another kind in another kind of layer")
        earlier: set[str] = set()
        for op in graph.operations:
            known = operations.get(op.name, op)
            if known.resource is not op.resource:
                raise ValueError(f"operation {op.name!r} has another resource in another kind of layer")
            operations[op.name] = replace(
                known,
                inputs=tuple(dict.fromkeys(known.inputs + op.inputs)),
                outputs=tuple(dict.fromkeys(known.outputs + op.outputs)),
                parameters=tuple(dict.fromkeys(known.parameters + op.parameters)),
                own_rows=tuple(dict.fromkeys(known.own_rows + op.own_rows)),
            )
            before.setdefault(op.name, set()).update(earlier)
            earlier.add(op.name)
    ordered: list[Operation] = []
    while left := [name for name in operations if operations[name] not in ordered]:
        ready = next((name for name in left if not before[name] & set(left)), None)
        if ready is None:
            raise ValueError(f"operations {', '.join(left)} come in opposite orders in two kinds of layers")
        ordered.append(operations[ready])
    parameters = {parameter.name: parameter for graph in reversed(kinds) for parameter in graph.parameters}
    return Graph(tuple(ordered), values, kinds[0].inputs, kinds[0].outputs, tuple(parameters.values()))
