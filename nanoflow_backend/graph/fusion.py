"""Fusion of quantising with the operation before it: a row is quantised while it is at hand, and not written twice."""

from __future__ import annotations

from dataclasses import replace

from nanoflow_backend.config.quantization import BLOCK
from nanoflow_backend.graph.operation import Graph, Operation, Value

FUSED = {"add_rms_norm": "add_rms_norm_quantise"}  # kernel -> the one that quantises its last output too


def fuse_quantise(graph: Graph) -> Graph:
    """The same graph, where no `quantise` reads what it need not, if nobody else reads that.

    It becomes part of the operation that writes its input, if that is one of FUSED: kernels round before they quantise,
    so results are the same, bit by bit. After a product with SwiGLU whose weight has blocks it takes SwiGLU over: the
    library's product of blocks is twice as fast as one that could do that itself.
    """
    writer = {value: op for op in graph.operations for value in op.outputs}
    readers = [value for op in graph.operations for value in op.inputs] + list(graph.outputs)
    shapes = {parameter.name: parameter.shape for parameter in graph.parameters}
    rewritten = {op.name: op for op in graph.operations}
    values = dict(graph.values)
    for quantise in (op for op in graph.operations if op.kernel == "quantise"):
        (x,) = quantise.inputs
        before = writer.get(x)
        if before is None or readers.count(x) > 1:
            continue
        if before.kernel in FUSED and before.outputs[-1] == x:
            del values[x], rewritten[quantise.name]
            rewritten[before.name] = replace(
                before,
                kernel=FUSED[before.kernel],
                outputs=(*before.outputs[:-1], *quantise.outputs),
                parameters=before.parameters + quantise.parameters,
                attributes={**before.attributes, **quantise.attributes},
            )
        elif before.kernel == "scaled_linear_swiglu" and len(shapes[before.parameters[1]]) == 2:
            values[x] = replace(values[x], width=2 * values[x].width)
            rewritten[before.name] = replace(before, kernel="scaled_linear")
            rewritten[quantise.name] = replace(
                quantise, kernel="swiglu_quantise", attributes={**quantise.attributes, "run": BLOCK}
            )
    return replace(graph, operations=tuple(rewritten.values()), values=values)


def separate_quantise(graph: Graph, name: str) -> Graph:
    """The same graph, where the norm `name` no longer quantises: what `fuse_quantise` made one is two again."""
    fused = graph[name]
    residual, quantised, scale = fused.outputs
    normed = quantised.removesuffix(".fp8")
    weight, *static_scale = fused.parameters
    attributes = dict(fused.attributes)
    norm = replace(
        fused,
        kernel=next(kernel for kernel, with_quantise in FUSED.items() if with_quantise == fused.kernel),
        outputs=(residual, normed),
        parameters=(weight,),
        attributes={"eps": attributes.pop("eps")},
    )
    quantise = Operation(
        f"{normed}_quantise",
        "quantise",
        fused.resource,
        (normed,),
        (quantised, scale),
        tuple(static_scale),
        attributes,
    )
    operations = tuple(new for op in graph.operations for new in ((norm, quantise) if op is fused else (op,)))
    values = {**graph.values, normed: Value(normed, graph.values[quantised].width)}
    return replace(graph, operations=operations, values=values)
