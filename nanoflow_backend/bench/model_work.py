"""ModelWork says what a model's forward pass must compute and read, by its op graph; nothing is measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import msgspec

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Value


class ModelWork(msgspec.Struct, frozen=True):
    """Of one rank, but for parameters. A multiplication and an addition are two FLOPs. Scales are not counted."""

    parameters: int  # P_model of the paper's section 3, over all ranks; of a mixture of experts those a token uses
    fp8_parameters: int  # of these, those whose products are of e4m3 operands
    linear_flop_per_token: int  # matrix products of all layers
    fp8_flop_per_token: int  # of these, products of e4m3 operands
    head_flop_per_row: int  # the LM head, on the rows that are sampled
    attention_flop_per_pair: int  # a query token and a key token that it attends to, in all layers and heads
    weight_bytes: int  # that a large step reads: all layers and the LM head
    token_weight_bytes: int  # of these, those that a step of one token reads: its experts
    kv_bytes_per_token: int  # K and V of all layers

    @classmethod
    def of(cls, model: Model, config: ModelConfig, precision: Precision) -> ModelWork:
        """`model`: one rank's graphs."""
        used = config.experts_per_token / config.num_experts if config.num_experts else 1.0
        head = _matrices([model.head], 1.0)
        layers = _matrices(model.in_order, 1.0)
        layers_of_token = _matrices(model.in_order, used)
        checkpoint = _checkpoint(model, used)
        attended = [_attended(graph) for graph in model.in_order]
        return cls(
            parameters=checkpoint.total(),
            fp8_parameters=checkpoint[FP8],
            linear_flop_per_token=2 * layers_of_token.total(),
            fp8_flop_per_token=2 * layers_of_token[FP8],
            head_flop_per_row=2 * head.total(),
            attention_flop_per_pair=4 * sum(q.width for q, _ in attended),
            weight_bytes=_bytes(layers + head, precision),
            token_weight_bytes=_bytes(layers_of_token + head, precision),
            kv_bytes_per_token=precision.element_bytes("kv") * sum(pages.width for _, pages in attended),
        )

    def optimal_tokens_per_s(self, flop_per_s: float, fp8_flop_per_s: float | None = None) -> float:
        """Eq. 5 of the paper, of one device: products never wait, each kind of them at its own rate."""
        seconds = 2 * (self.parameters - self.fp8_parameters) / flop_per_s
        return 1 / (seconds + (2 * self.fp8_parameters / fp8_flop_per_s if fp8_flop_per_s else 0.0))


def _attended(graph: Graph) -> tuple[Value, Value]:
    """Queries and pages of a layer's attention."""
    attention = next(op for op in graph.operations if op.kernel == "attention")
    q, pages = (graph.values[name] for name in attention.inputs[:2])
    return q, pages


def _matrices(graphs: Sequence[Graph], used: float) -> Counter[str]:
    """By dtype, the elements of one application's matrices, those of experts times `used`."""
    elements: Counter[str] = Counter()
    for graph in graphs:
        shares = _shares(graph, used)
        for parameter in graph.parameters:
            if len(parameter.shape) > 1 and parameter.scale is None:
                elements[parameter.dtype] += round(prod(parameter.shape) * shares[parameter.name])
    return elements


def _bytes(elements: Counter[str], precision: Precision) -> int:
    return sum(precision.element_bytes(dtype) * number for dtype, number in elements.items())


def _checkpoint(model: Model, used: float) -> Counter[str]:
    """By dtype, the elements of the checkpoint's tensors, each once, those of experts times `used`."""
    sizes = {}
    graphs = [("", model.embed), *((str(i), graph) for i, graph in enumerate(model.in_order)), ("", model.head)]
    for layer, graph in graphs:
        shares = _shares(graph, used)
        for parameter in graph.parameters:
            for source in parameter.sources if parameter.scale is None else ():
                tensor = (source.tied_to or source.tensor).replace("{layer}", layer)
                sizes[tensor] = parameter.dtype, round(prod(source.shape) * shares[parameter.name])
    elements: Counter[str] = Counter()
    for dtype, size in sizes.values():
        elements[dtype] += size
    return elements


def _shares(graph: Graph, used: float) -> dict[str, float]:
    """By parameter, how much of it the product with one token needs."""
    return {
        name: used if "grouped_" in operation.kernel else 1.0
        for operation in graph.operations
        for name in operation.parameters
    }
