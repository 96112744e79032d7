"""ModelWork says what a model's forward pass must compute and read, by its op graph; nothing is measured."""

from __future__ import annotations

from math import prod

import msgspec

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Value


class ModelWork(msgspec.Struct, frozen=True):
    """Of one rank, but for `parameters`. A multiplication and an addition are two FLOPs."""

    parameters: int  # P_model of the paper's section 3, over all ranks; of a mixture of experts those a token uses
    linear_flop_per_token: int  # matrix products of all layers
    head_flop_per_row: int  # the LM head, on the rows that are sampled
    attention_flop_per_pair: int  # a query token and a key token that it attends to, in all layers and heads
    weight_bytes: int  # that a large step reads: all layers and the LM head
    token_weight_bytes: int  # of these, those that a step of one token reads: its experts
    kv_bytes_per_token: int  # K and V of all layers

    @classmethod
    def of(cls, model: Model, config: ModelConfig, precision: Precision) -> ModelWork:
        """`model`: one rank's graphs."""
        used = config.experts_per_token / config.num_experts if config.num_experts else 1.0
        head = _weights(model.head, 1.0)
        layers = sum(_weights(graph, 1.0) for graph in model.in_order)
        layers_of_token = sum(_weights(graph, used) for graph in model.in_order)
        attended = [_attended(graph) for graph in model.in_order]
        weight_bytes, kv_bytes = precision.element_bytes("weights"), precision.element_bytes("kv")
        return cls(
            parameters=_checkpoint(model, used),
            linear_flop_per_token=2 * layers_of_token,
            head_flop_per_row=2 * head,
            attention_flop_per_pair=4 * sum(q.width for q, _ in attended),
            weight_bytes=weight_bytes * (layers + head),
            token_weight_bytes=weight_bytes * (layers_of_token + head),
            kv_bytes_per_token=kv_bytes * sum(pages.width for _, pages in attended),
        )


def _attended(graph: Graph) -> tuple[Value, Value]:
    """Queries and pages of a layer's attention."""
    attention = next(op for op in graph.operations if op.kernel == "attention")
    q, pages = (graph.values[name] for name in attention.inputs[:2])
    return q, pages


def _weights(graph: Graph, used: float) -> int:
    """Elements of one application's matrices, those of experts times `used`."""
    shares = _shares(graph, used)
    return round(sum(prod(p.shape) * shares[p.name] for p in graph.parameters if len(p.shape) > 1))


def _checkpoint(model: Model, used: float) -> int:
    """Elements of the checkpoint's tensors, each once, those of experts times `used`."""
    sizes = {}
    graphs = [("", model.embed), *((str(i), graph) for i, graph in enumerate(model.in_order)), ("", model.head)]
    for layer, graph in graphs:
        shares = _shares(graph, used)
        for parameter in graph.parameters:
            for source in parameter.sources:
                tensor = (source.tied_to or source.tensor).replace("{layer}", layer)
                sizes[tensor] = prod(source.shape) * shares[parameter.name]
    return round(sum(sizes.values()))


def _shares(graph: Graph, used: float) -> dict[str, float]:
    """By parameter, how much of it the product with one token needs."""
    return {
        name: used if operation.kernel.startswith("grouped_") else 1.0
        for operation in graph.operations
        for name in operation.parameters
    }
