"""Work: what an operation computes, reads and sends, from the shapes of the op graph.

Shapes of one rank; a graph of one rank is the whole model. Biases and scalars are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph, Kind, Operation, Resource


@dataclass(frozen=True)
class Work:
    """Of one launch."""

    flop: float = 0.0
    memory_bytes: float = 0.0
    network_bytes: float = 0.0  # one way, of one rank

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flop + other.flop,
            self.memory_bytes + other.memory_bytes,
            self.network_bytes + other.network_bytes,
        )


@dataclass(frozen=True)
class Mix:
    """The tokens of a batch: so many that decode, so many of prompts, each over a mean context."""

    decode_tokens: float
    prefill_tokens: float
    decode_context: float  # tokens that a decoding one attends to
    prefill_context: float

    @property
    def tokens(self) -> float:
        return self.decode_tokens + self.prefill_tokens


def operation_work(
    graph: Graph, operation: Operation, mix: Mix, ranks: int = 1, precision: Precision = BFLOAT16
) -> Work:
    """One launch of `operation` on all tokens of `mix`. Every weight is read once, and so is each decode's context."""
    element_bytes, kv_bytes = precision.element_bytes("activations"), precision.element_bytes("kv")
    values = [graph.values[name] for name in (*operation.inputs, *operation.outputs)]
    width = sum(value.width for value in values if value.kind is Kind.TOKENS)
    moved = mix.tokens * width * element_bytes
    if operation.kernel == "attention":
        return _attention(graph, operation, Mix(mix.decode_tokens, 0, mix.decode_context, 0), precision) + (
            _attention(graph, operation, Mix(0, mix.prefill_tokens, 0, mix.prefill_context), precision)
        )
    if operation.resource is Resource.COMPUTE:
        shapes = {p.name: p.shape for p in graph.parameters}
        shape = shapes[operation.parameters[0]]
        chosen = 1
        if len(shape) == 3:  # each token meets the matrices of its experts alone
            chosen = next(v.width for v in values if v.name in operation.inputs and v.dtype == "int32")
        weights = prod(shape) * precision.element_bytes("weights")
        return Work(2 * mix.tokens * chosen * shape[-1] * shape[-2], weights + moved)
    if operation.kernel in ("all_reduce", "reduce_scatter", "all_gather"):
        whole = max(graph.values[name].width for name in (*operation.inputs, *operation.outputs))
        passes = 2 if operation.kernel == "all_reduce" else 1
        sent = passes * (ranks - 1) / ranks * mix.tokens * whole * element_bytes
        return Work(0.0, sent, sent)
    pages = sum(value.width for value in values if value.kind is Kind.PAGES)  # what rope_append writes
    return Work(0.0, moved + mix.tokens * pages * kv_bytes)


def _attention(graph: Graph, operation: Operation, mix: Mix, precision: Precision) -> Work:
    """Of decodes or of prompts: every decode reads its context; the queries of a prompt's chunk share it."""
    q, kv = graph.values[operation.inputs[0]].width, graph.values[operation.inputs[1]].width
    context = mix.decode_context + mix.prefill_context
    read = kv * context * mix.decode_tokens
    of_kv = (read + kv * mix.tokens) * precision.element_bytes("kv")
    return Work(4 * q * context * mix.tokens, of_kv + 2 * q * mix.tokens * precision.element_bytes("activations"))


def layer_work(graph: Graph, mix: Mix, ranks: int = 1, precision: Precision = BFLOAT16) -> dict[str, Work]:
    """By operation, the work of one launch on all tokens of `mix`."""
    return {op.name: operation_work(graph, op, mix, ranks, precision) for op in graph.operations}
