"""The forms of an all-reduce: as one operation, or rewritten so that parts of it overlap, or are fused with a norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from enum import StrEnum

from nanoflow_backend.config.quantization import BLOCK
from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.fusion import separate_quantise
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Operation, Parameter, Resource, ScaleOf, Value


class AllReduceForm(StrEnum):
    """What runs in the place of an all-reduce of a product's partial sums. T tokens, D columns, n ranks."""

    SPLIT = "split"  # each rank sums its D / n columns, then all gather: other launches may come between
    # The product's inputs are gathered, each rank computes D / n columns of the product, and all gather these.
    GATHERED = "gathered"
    # Each rank sums its T / n rows, adds the residual, norms and gathers: one operation, and one residual for all.
    NORMED = "normed"


Forms = Mapping[str, AllReduceForm]  # by all-reduce; those that are not named stay one operation


def in_forms(graph: Graph, forms: Forms, tp: int) -> Graph:
    """Rewrite a layer's graph with its all-reduces in `forms`, on each of `tp` ranks.

    What follows an all-reduce reads the same values, except in the form NORMED: there a rank has its own rows of the
    residual stream alone, and its own part of the sum that the layer carries to the next one (see `is_partial`).

    Raises:
        ValueError: a name that is no all-reduce, or one that cannot have its form: the message says why.
    """
    all_reduces = _check_names(graph, forms)
    normed = [name for name, form in forms.items() if form is AllReduceForm.NORMED]
    if normed and set(normed) != all_reduces:
        raise ValueError(
            f"{AllReduceForm.NORMED}: expected all of {sorted(all_reduces)} in it, for they share one residual, "
            f"got {sorted(normed)}"
        )
    if normed and tp == 1:
        raise ValueError(f"{AllReduceForm.NORMED}: expected several ranks, got 1")
    rewrite = {AllReduceForm.SPLIT: _split, AllReduceForm.GATHERED: _gather, AllReduceForm.NORMED: _norm}
    for name, form in forms.items():
        graph = rewrite[form](graph, graph[name], tp)
    return graph


def model_in_forms(model: Model, forms: Forms, tp: int) -> Model:
    """Return the model with the all-reduces of every kind of layer in `forms`, where the layer has them.

    Raises: what `in_forms` raises.
    """
    _check_names(model.layer, forms)
    layers = (in_forms(kind, {name: forms[name] for name in forms if name in kind}, tp) for kind in model.layers)
    return replace(model, layers=tuple(layers))


def describe_forms(forms: Forms) -> str:
    """Return a name for `forms`: "whole", "normed", or "gathered+split"."""
    return "+".join(dict.fromkeys(form.value for form in forms.values())) or "whole"


def is_partial(forms: Forms) -> bool:
    """Whether layers in `forms` carry parts to each other: a rank's rows of the residual, and its part of the update.

    Then the first layer takes the embedding as the update of one rank and zeros as that of the others, and what the
    last one carries has yet to be summed and gathered.
    """
    return AllReduceForm.NORMED in forms.values()


def catalogue(layer: Graph, all_forms: Iterable[Forms], tp: int) -> Graph:
    """Return all operations that a layer has in any of `all_forms`, each once, with their values and parameters.

    This is no layer: it lists what there is to measure. Operations of one name are the same in every form.
    """
    graphs = [in_forms(layer, forms, tp) for forms in all_forms]
    operations = {op.name: op for graph in reversed(graphs) for op in graph.operations}
    values = {name: value for graph in reversed(graphs) for name, value in graph.values.items()}
    parameters = {p.name: p for graph in reversed(graphs) for p in graph.parameters}
    ordered = dict.fromkeys(op.name for graph in graphs for op in graph.operations)
    return replace(
        layer,
        operations=tuple(operations[name] for name in ordered),
        values=values,
        parameters=tuple(parameters.values()),
    )


def with_parameters(model: Model, all_forms: Iterable[Forms], tp: int) -> Model:
    """Return the model with the parameters that its layers need in any of `all_forms`: those are to be loaded."""
    models = [model_in_forms(model, forms, tp) for forms in all_forms]
    kinds = []
    for number, kind in enumerate(model.layers):
        needed = {p.name: p for other in models for p in other.layers[number].parameters}
        kinds.append(replace(kind, parameters=tuple(needed.values())))
    return replace(model, layers=tuple(kinds))


def _check_names(graph: Graph, forms: Forms) -> set[str]:
    all_reduces = {op.name for op in graph.operations if op.kernel == "all_reduce"}
    if unknown := set(forms) - all_reduces:
        raise ValueError(f"not an all-reduce: {', '.join(sorted(unknown))}; the graph has {sorted(all_reduces)}")
    return all_reduces


def _split(graph: Graph, reduce: Operation, tp: int) -> Graph:
    part = _columns_of(graph.values[reduce.inputs[0]], f"{reduce.name}.part", reduce.name, tp)
    scatter = Operation(
        f"{reduce.name}.reduce_scatter", "reduce_scatter_columns", Resource.NETWORK, reduce.inputs, (part.name,)
    )
    return _replaced(graph, {reduce.name: (scatter, _all_gather(f"{reduce.name}.all_gather", part.name, reduce))}, part)


def _gather(graph: Graph, reduce: Operation, tp: int) -> Graph:
    product = _writer(graph, reduce.inputs[0])
    parameters = {parameter.name: parameter for parameter in graph.parameters}
    if product.kernel not in ("linear", "scaled_linear"):
        raise ValueError(f"{reduce.name}: expected a product of one matrix before it, got {product.name}")
    quantises = (op for op in graph.operations if op.kernel == "quantise")
    quantise = next((op for op in quantises if product.inputs[0] in op.outputs), None)
    x, weight = graph.values[(quantise or product).inputs[0]], parameters[product.parameters[0]]
    whole, columns = replace(x, name=f"{x.name}.gathered", width=tp * x.width), weight.sources[0].shape[1]
    if whole.width != columns:
        raise ValueError(f"{reduce.name}: ranks pad the {columns} columns of {weight.name}: they cannot be gathered")
    part = _columns_of(graph.values[reduce.inputs[0]], f"{product.name}.columns", reduce.name, tp)
    made = {name: _cut_by_rows(parameters[name], tp) for name in product.parameters}

    gather = Operation(f"{reduce.name}.gather_input", "all_gather_columns", Resource.NETWORK, (x.name,), (whole.name,))
    front, inputs, values = [gather], (whole.name, *product.inputs[1:]), [whole, part]
    if quantise:  # what was gathered, so that a row has one scale, as on one rank
        quantised, scale = (replace(graph.values[name], name=f"{name}.gathered") for name in quantise.outputs)
        values += [
            replace(quantised, width=tp * quantised.width),
            replace(scale, width=tp * scale.width if quantise.attributes["group"] else scale.width),
        ]
        inputs = (quantised.name, scale.name, *product.inputs[2:])
        name = f"{quantise.name}.gathered"
        front.append(replace(quantise, name=name, inputs=(whole.name,), outputs=(quantised.name, scale.name)))
    by_columns = replace(
        product, name=part.name, inputs=inputs, outputs=(part.name,), parameters=tuple(p.name for p in made.values())
    )
    rewritten: dict[str, tuple[Operation, ...]] = {
        **({quantise.name: ()} if quantise else {}),
        product.name: (*front, by_columns),
        reduce.name: (_all_gather(f"{reduce.name}.all_gather", part.name, reduce),),
    }
    kept = tuple(made.get(p.name, p) for p in graph.parameters)
    return replace(_replaced(graph, rewritten, *values), parameters=kept)


def _norm(graph: Graph, reduce: Operation, tp: int) -> Graph:
    (partial,), (total,) = reduce.inputs, reduce.outputs
    carried = next((name for name, output in graph.carried.items() if output == total), None)
    readers = [op for op in graph.operations if {total, carried} & set(op.inputs)]
    if len(readers) != 1 or not readers[0].kernel.startswith("add_rms_norm"):
        raise ValueError(f"{reduce.name}: expected one norm after it, got {[op.name for op in readers]}")
    if readers[0].kernel != "add_rms_norm":
        graph = separate_quantise(graph, readers[0].name)
    norm = graph[readers[0].name]
    residual, update = norm.inputs
    fused = replace(
        norm,
        name=f"{reduce.name}.normed",
        kernel="reduce_scatter_add_rms_norm_all_gather",
        resource=Resource.NETWORK,
        inputs=(residual, update if carried else partial),
        own_rows=(residual, norm.outputs[0]),
    )
    graph = _replaced(graph, {reduce.name: (), norm.name: (fused,)})
    return replace(graph, outputs=tuple(partial if name == total else name for name in graph.outputs))


def _replaced(graph: Graph, rewritten: Mapping[str, tuple[Operation, ...]], *values: Value) -> Graph:
    operations = tuple(new for op in graph.operations for new in rewritten.get(op.name, (op,)))
    return replace(graph, operations=operations, values={**graph.values, **{value.name: value for value in values}})


def _writer(graph: Graph, value: str) -> Operation:
    return next(op for op in graph.operations if value in op.outputs)


def _columns_of(whole: Value, name: str, reduce: str, tp: int) -> Value:
    """A rank's columns of a value. Raises: ValueError, the ranks cannot share them evenly."""
    if whole.width % tp:
        raise ValueError(f"{reduce}: width {whole.width} is not a multiple of {tp} ranks")
    return replace(whole, name=name, width=whole.width // tp)


def _all_gather(name: str, part: str, reduce: Operation) -> Operation:
    return Operation(name, "all_gather_columns", Resource.NETWORK, (part,), reduce.outputs)


def _cut_by_rows(parameter: Parameter, tp: int) -> Parameter:
    """The same matrix, its scales or its bias, of which ranks hold rows instead of columns (of the bias, which one rank
    held, their own part); under a name of its own, for other plans may need the columns.

    Raises: ValueError, blocks that ranks would cut.
    """
    sources = tuple(replace(source, shard=0, units=0, once=False) for source in parameter.sources)
    shape = local_shape(sources[0], tp)
    if parameter.scale is ScaleOf.WEIGHT:
        rows, columns = shape
        in_blocks = len(parameter.shape) == 2
        if in_blocks and (rows % BLOCK or columns % BLOCK):
            raise ValueError(f"{parameter.name}: {tp} ranks would cut its blocks of {BLOCK}")
        shape = (rows // BLOCK, columns // BLOCK) if in_blocks else (rows,)
    base, dot, last = parameter.name.partition(".")
    return replace(parameter, name=f"{base}.columns{dot}{last}", shape=shape, sources=sources)
