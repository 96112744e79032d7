"""The two forms of an all-reduce: one operation, or a reduce-scatter and an all-gather with room between them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from nanoflow_backend.graph.operation import Graph, Operation, Resource


def split_all_reduce(graph: Graph, names: Collection[str], tp: int) -> Graph:
    """Rewrite the named all-reduces as reduce-scatter (each rank sums its columns) + all-gather.

    The all-gather keeps the all-reduce's output value, so nothing that follows changes.

    Raises:
        ValueError: a name that is no all-reduce, or a width that the ranks cannot share evenly.
    """
    all_reduces = {op.name for op in graph.operations if op.kernel == "all_reduce"}
    if unknown := set(names) - all_reduces:
        raise ValueError(f"not an all-reduce: {', '.join(sorted(unknown))}; the graph has {sorted(all_reduces)}")
    operations: list[Operation] = []
    values = dict(graph.values)
    for op in graph.operations:
        if op.name not in names:
            operations.append(op)
            continue
        summed = graph.values[op.inputs[0]]
        if summed.width % tp:
            raise ValueError(f"{op.name}: width {summed.width} is not a multiple of {tp} ranks")
        part = replace(summed, name=f"{op.name}.part", width=summed.width // tp)
        values[part.name] = part
        operations += [
            Operation(f"{op.name}.reduce_scatter", "reduce_scatter_columns", Resource.NETWORK, op.inputs, (part.name,)),
            Operation(f"{op.name}.all_gather", "all_gather_columns", Resource.NETWORK, (part.name,), op.outputs),
        ]
    return replace(graph, operations=tuple(operations), values=values)
