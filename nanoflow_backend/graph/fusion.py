"""Fusion of quantising into the operation before it: a row is quantised while it is at hand, and not written twice."""

from __future__ import annotations

from dataclasses import replace

from nanoflow_backend.graph.operation import Graph, Operation

FUSED = {"add_rms_norm": "add_rms_norm_quantise"}  # kernel -> the one that quantises its last output too


def fuse_quantise(graph: Graph) -> Graph:
    """The same graph, where each `quantise` whose input nobody else reads is part of the operation that writes it,
    if that is one of FUSED. Kernels round before they quantise, so results are the same, bit by bit."""
    writer = {value: op for op in graph.operations for value in op.outputs}
    readers = [value for op in graph.operations for value in op.inputs] + list(graph.outputs)
    fused: dict[str, Operation] = {}  # by name of the first of the two
    values = dict(graph.values)
    for quantise in (op for op in graph.operations if op.kernel == "quantise"):
        (x,) = quantise.inputs
        before = writer.get(x)
        if before is None or before.kernel not in FUSED or before.outputs[-1] != x or readers.count(x) > 1:
            continue
        del values[x]
        fused[quantise.name] = fused[before.name] = replace(
            before,
            kernel=FUSED[before.kernel],
            outputs=(*before.outputs[:-1], *quantise.outputs),
            parameters=before.parameters + quantise.parameters,
            attributes={**before.attributes, **quantise.attributes},
        )
    operations = dict.fromkeys(fused.get(op.name, op).name for op in graph.operations)
    by_name = {op.name: fused.get(op.name, op) for op in graph.operations}
    return replace(graph, operations=tuple(by_name[name] for name in operations), values=values)
