"""The work of an operation is what it computes, reads and sends; it follows from the shapes of the op graph.

Shapes are those of one rank. Biases and scales of weights are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nanoflow_backend.config.network_table import PASSES, Collective
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.graph.operation import Graph, Kind, Operation, Resource
from nanoflow_search.cost.workload import Mix

# What each kernel of the network is made of, as tables of networks name it.
COLLECTIVES: dict[str, tuple[Collective, ...]] = {
    "all_reduce": ("all_reduce",),
    "reduce_scatter_columns": ("reduce_scatter",),
    "reduce_scatter_rows": ("reduce_scatter",),
    "all_gather_columns": ("all_gather",),
    "all_gather_rows": ("all_gather",),
    "reduce_scatter_add_rms_norm_all_gather": ("reduce_scatter", "all_gather"),
}


@dataclass(frozen=True)
class Work:
    """The work of one launch of an operation."""

    flop: float = 0.0  # of 16-bit operands, or wider ones
    memory_bytes: float = 0.0
    network_bytes: float = 0.0  # one way, of one rank
    fp8_flop: float = 0.0  # of e4m3 operands

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flop + other.flop,
            self.memory_bytes + other.memory_bytes,
            self.network_bytes + other.network_bytes,
            self.fp8_flop + other.fp8_flop,
        )


def operation_work(
    graph: Graph, operation: Operation, mix: Mix, ranks: int = 1, precision: Precision = BFLOAT16
) -> Work:
    """Return the work of one launch of `operation` on all tokens of `mix`.

    Every weight is read once, and so is the context of each token that decodes.
    """
    values = [graph.values[name] for name in (*operation.inputs, *operation.outputs)]
    rows = [value for value in values if value.kind is Kind.TOKENS]
    moved = mix.tokens * sum(value.width * precision.element_bytes(value.dtype) for value in rows)
    if operation.kernel == "attention":
        return _attention(graph, operation, Mix(mix.decode_tokens, 0, mix.decode_context, 0), precision) + (
            _attention(graph, operation, Mix(0, mix.prefill_tokens, 0, mix.prefill_context), precision)
        )
    if operation.resource is Resource.COMPUTE:
        weight = next(p for p in graph.parameters if p.name == operation.parameters[0])
        shape, chosen = weight.shape, 1
        if len(shape) == 3:  # each token meets the matrices of its experts alone
            chosen = next(v.width for v in values if v.name in operation.inputs and v.dtype == "int32")
        read = prod(shape) * precision.element_bytes(weight.dtype) + moved
        flop = 2 * mix.tokens * chosen * shape[-1] * shape[-2]
        return Work(memory_bytes=read, fp8_flop=flop) if weight.dtype == FP8 else Work(flop, read)
    if operation.resource is Resource.NETWORK:
        whole = mix.tokens * max(value.width * precision.element_bytes(value.dtype) for value in values)
        sent = sum(PASSES[part] for part in COLLECTIVES[operation.kernel]) * (ranks - 1) / ranks * whole
        own = len(operation.own_rows) * whole / ranks  # of the residual: read and written
        return Work(0.0, sent + own, sent)
    pages = sum(value.width for value in values if value.kind is Kind.PAGES)  # what rope_append writes
    return Work(0.0, moved + mix.tokens * pages * precision.element_bytes("kv"))


def _attention(graph: Graph, operation: Operation, mix: Mix, precision: Precision) -> Work:
    """Return the work of attention on decodes alone or on prompts alone.

    Every decode reads its own context, or its window of it; all queries of a prompt's chunk share one read of theirs.
    """
    q, kv = graph.values[operation.inputs[0]].width, graph.values[operation.inputs[1]].width
    context = mix.decode_context + mix.prefill_context
    context = min(context, operation.attributes.get("window", context))
    read = kv * context * mix.decode_tokens
    of_kv = (read + kv * mix.tokens) * precision.element_bytes("kv")
    return Work(4 * q * context * mix.tokens, of_kv + 2 * q * mix.tokens * precision.element_bytes("activations"))


def layer_work(graph: Graph, mix: Mix, ranks: int = 1, precision: Precision = BFLOAT16) -> dict[str, Work]:
    """Return the work of every operation of a layer, by name."""
    return {op.name: operation_work(graph, op, mix, ranks, precision) for op in graph.operations}
