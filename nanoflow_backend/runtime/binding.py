"""Binding turns the launches of schedules into kernel calls on one device's tensors. All programs have one.

T tokens of a batch, R rows that are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.collectives import is_partial, model_in_forms
from nanoflow_backend.graph.model import Model
from nanoflow_backend.graph.operation import Graph, Kind, Operation, Resource
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.buffers import Buffer, BufferPlan, LayerValue, layer_value, merge_plans, plan_buffers
from nanoflow_backend.runtime.collectives.protocol import Collectives, rank_rows
from nanoflow_backend.schedule.plan import Group, Schedule
from nanoflow_backend.schedule.validate import describe

Kernels = ModuleType | SimpleNamespace


class KernelCall(NamedTuple):
    """A kernel on its tensors. `rows` are the outputs of this call alone: pages hold what earlier steps wrote too."""

    where: str
    run: partial[None]
    rows: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class BoundPlan:
    """A schedule of a model's layers, and where its values lie. Each is equal to itself alone."""

    schedule: Schedule
    layers: Sequence[Graph]  # of all layers in order, their all-reduces in the schedule's form
    steps: Sequence[tuple[int, int]]  # (layer, launch number), in the order of issue
    buffers: BufferPlan


class FittedPlan(NamedTuple):
    """A plan on batches of `tokens`, padding included: what one step runs."""

    bound: BoundPlan
    tokens: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """How the rows of the batch are to lie. The last ones may hold padding."""
        return self.bound.schedule.fit_groups(self.tokens)


class Binding:
    """Weights, pages, the batch's ints and activation buffers, and which rows of them each launch works on.

    `schedules`: in the order of a schedule file; a batch runs under the first that holds it.
    weights: by parameter name, those of layer i as "layers.{i}.{name}". `positions` and `slots` are int32
    [max_tokens], and hold the batch's before a call runs. With `in_place`, collectives of a single rank are no calls:
    their output is their input. With `limit_sms`, launches that have a cap, or are in a lane with SMs of its own, pass
    it to their kernel as `num_sms`.
    """

    def __init__(
        self,
        model: Model,
        schedules: Sequence[Schedule],
        weights: Mapping[str, Tensor],
        kv: KvPages,
        collectives: Collectives,
        kernels: Kernels,
        *,
        max_tokens: int,
        precision: Precision,
        device: torch.device | str = "cpu",
        in_place: bool = False,
        limit_sms: bool = False,
    ) -> None:
        if max_tokens > schedules[-1].tokens:
            raise ValueError(f"max_tokens: expected at most the schedule's {schedules[-1].tokens}, got {max_tokens}")
        self.model, self.weights, self.kv = model, weights, kv
        self.device = torch.device(device)
        self.max_tokens, self.collectives, self.kernels = max_tokens, collectives, kernels
        self._limit_sms = limit_sms
        self._in_place = in_place and collectives.ranks == 1
        self._precision = precision
        layers = [model_in_forms(model, plan.all_reduces, collectives.ranks).in_order for plan in schedules]
        buffers = merge_plans(
            [
                plan_buffers(graphs, schedule, self._aliases(*graphs))
                for graphs, schedule in zip(layers, schedules, strict=True)
            ]
        )
        self.plans = [
            BoundPlan(schedule, graphs, schedule.unroll(model.num_layers), plan)
            for schedule, graphs, plan in zip(schedules, layers, buffers, strict=True)
        ]
        self.buffers = [self.empty(max_tokens, self._padded(b), dtype=b.dtype) for b in buffers[0].buffers]
        self._whole = self._whole_results()
        self.positions = self.empty(max_tokens, dtype="int32")
        self.slots = self.empty(max_tokens, dtype="int32")
        self.page_table: Tensor | None = None

    def empty(self, *shape: int, dtype: str) -> Tensor:
        """`dtype` as in Value."""
        return torch.empty(shape, dtype=getattr(torch, self._precision.dtype(dtype)), device=self.device)

    def _padded(self, buffer: Buffer) -> int:
        """Columns of a buffer: rows begin at multiples of 16 bytes, which bulk copies ask for, but for vectors: these
        are contiguous, as libraries want scales. _buffer_rows cuts what a value has."""
        elements = 16 // self._precision.element_bytes(buffer.dtype)
        return 1 if buffer.is_vector else -(-buffer.width // elements) * elements

    def plan_for(self, tokens: int, decode_kv_tokens: int) -> FittedPlan:
        """The plan under which a batch of `tokens` runs, whose decodes read so many tokens of the KV cache.

        Raises: ValueError, none holds it.
        """
        for plan in self.plans:
            if plan.schedule.holds(tokens, decode_kv_tokens):
                return FittedPlan(plan, tokens)
        raise ValueError(f"no plan for {tokens} tokens whose decodes read {decode_kv_tokens} tokens of the KV cache")

    def waits(self, plan: BoundPlan) -> list[list[int]]:
        """For each step the steps of other lanes that it waits for, as places in the order of issue.

        To those of the schedule come those of collectives, which take turns: two at once, which a device may begin in
        another order on every rank, could each wait for ranks that wait in the other.
        """
        waits, launches = plan.schedule.awaited(self.model.num_layers), plan.schedule.launches
        exchanges = [
            (step, launches[number].lane)
            for step, (layer, number) in enumerate(plan.steps)
            if self.collectives.ranks > 1 and _is_exchange(plan.layers[layer], launches[number].operation)
        ]
        for (before, lane_before), (step, lane) in pairwise(exchanges):
            if lane != lane_before and before not in waits[step]:
                waits[step].append(before)
        return waits

    def embed(self, fitted: FittedPlan, token_ids: Tensor) -> list[KernelCall]:
        """Token ids [T] to the inputs of the first layer."""
        plan, tokens = fitted
        embedded = {
            name: self._buffer_rows(plan, LayerValue(-1, value), 0, tokens)
            for name, value in zip(self.model.embed.outputs, plan.layers[0].outputs, strict=True)
        }
        calls = self._bind_graph(self.model.embed, {self.model.embed.inputs[0]: token_ids, **embedded})
        if is_partial(plan.schedule.all_reduces) and self.collectives.rank:
            update = embedded[self.model.embed.outputs[1]]  # the first rank's is that of all
            calls.append(KernelCall("the embedding", partial(_zero, update), (update,)))
        return calls

    def layers(self, fitted: FittedPlan) -> list[KernelCall | None]:
        """The call of each step; None where there is nothing to do."""
        plan, tokens = fitted
        ranges = plan.schedule.fit(tokens)
        calls: list[KernelCall | None] = []
        for layer, number in plan.steps:
            start, stop = ranges[number]
            launch, graph = plan.schedule.launches[number], plan.layers[layer]
            if start == stop or launch.operation not in graph:
                calls.append(None)
                continue
            operation = graph[launch.operation]
            if self._in_place and operation.resource is Resource.NETWORK:
                calls.append(None)
                continue
            value = partial(self._operand, plan, layer, operation, start=start, stop=stop)
            where = f"{describe(number, launch)} in layer {layer}"
            sms = plan.schedule.sms(launch) if self._limit_sms else None
            calls.append(self._bind(graph, operation, value, where, f"layers.{layer}.", sms))
        return calls

    def complete(self, fitted: FittedPlan) -> list[KernelCall]:
        """What sums and gathers the last layer's outputs, where a rank has parts of them."""
        plan, _ = fitted
        if not is_partial(plan.schedule.all_reduces):
            return []
        last = self.model.num_layers - 1
        residual, update = plan.layers[last].outputs
        writer = next(op.name for op in plan.layers[last].operations if residual in op.outputs)
        calls = []
        for launch, (start, stop) in zip(plan.schedule.launches, plan.schedule.fit(fitted.tokens), strict=True):
            if launch.operation != writer or start == stop:
                continue
            whole, total = (rows[start:stop] for rows in self._whole)
            parts = self._own(self._buffer_rows(plan, LayerValue(last, residual), start, stop))
            gather = partial(self.collectives.all_gather_rows, parts, out=whole)
            calls.append(KernelCall("the residual", gather, (whole,)))
            summed = self._buffer_rows(plan, LayerValue(last, update), start, stop)
            calls.append(KernelCall("the update", partial(self.collectives.all_reduce, summed, out=total), (total,)))
        return calls

    def results(self, fitted: FittedPlan) -> tuple[Tensor, ...]:
        """The last layer's outputs [T, D], whole once `complete` has run."""
        (plan, tokens), last = fitted, self.model.num_layers - 1
        if is_partial(plan.schedule.all_reduces):
            return tuple(rows[:tokens] for rows in self._whole)
        return tuple(self._buffer_rows(plan, LayerValue(last, value), 0, tokens) for value in plan.layers[last].outputs)

    def head(self, values: dict[str, Tensor]) -> list[KernelCall]:
        """Rows of the results to logits; `values` has the head's inputs, and gets all that it computes."""
        return self._bind_graph(self.model.head, values)

    def _bind_graph(self, graph: Graph, values: dict[str, Tensor]) -> list[KernelCall]:
        """All of a graph on whole tensors. Outputs that are not among `values` are allocated."""
        rows = len(values[graph.inputs[0]])
        aliases = self._aliases(graph)
        calls = []
        for operation in graph.operations:
            for name in operation.outputs:
                if name in aliases:
                    values[name] = values[aliases[name]]
                elif name not in values:
                    values[name] = self.empty(rows, graph.values[name].width, dtype=graph.values[name].dtype)
            if operation.outputs[0] not in aliases:
                calls.append(self._bind(graph, operation, values.__getitem__, operation.name))
        return calls

    def _aliases(self, *graphs: Graph) -> dict[str, str]:
        """Output -> input of the collectives that have nothing to do."""
        operations = (op for graph in graphs for op in graph.operations)
        idle = (op for op in operations if self._in_place and op.resource is Resource.NETWORK)
        return {op.outputs[0]: op.inputs[0] for op in idle}

    def _operand(self, plan: BoundPlan, layer: int, operation: Operation, name: str, start: int, stop: int) -> Tensor:
        """What a launch of an operation of `layer` on rows start .. stop - 1 means by a value's name."""
        if name == "page_table":
            assert self.page_table is not None
            return self.page_table
        if plan.layers[layer].values[name].kind is Kind.PAGES:
            return self.kv.layer(layer)
        if name in ("positions", "slots"):
            return (self.positions if name == "positions" else self.slots)[start:stop]
        rows = self._buffer_rows(plan, layer_value(plan.layers[layer], layer, name), start, stop)
        return self._own(rows) if name in operation.own_rows else rows

    def _own(self, rows: Tensor) -> Tensor:
        """This rank's share of the rows of a launch."""
        mine = rank_rows(len(rows), self.collectives.rank, self.collectives.ranks)
        return rows[mine.start : mine.stop]

    def _whole_results(self) -> tuple[Tensor, ...]:
        """Where `complete` puts the last layer's outputs, for the plans that have parts of them."""
        if not any(is_partial(plan.schedule.all_reduces) for plan in self.plans):
            return ()
        last = self.plans[0].layers[-1]
        return tuple(
            self.empty(self.max_tokens, self._padded(Buffer(value.width, value.dtype)), dtype=value.dtype)[
                :, : value.width
            ]
            for value in (last.values[name] for name in last.outputs)
        )

    def _buffer_rows(self, plan: BoundPlan, value: LayerValue, start: int, stop: int) -> Tensor:
        width = plan.layers[max(value.layer, 0)].values[value.name].width
        return self.buffers[plan.buffers.holder[value]][start:stop, :width]

    def _bind(
        self,
        graph: Graph,
        operation: Operation,
        value: Callable[[str], Tensor],
        where: str,
        prefix: str = "",
        sms: int | None = None,
    ) -> KernelCall:
        implementation = self.collectives if operation.resource is Resource.NETWORK else self.kernels
        inputs = [value(name) for name in operation.inputs] + [self.weights[prefix + p] for p in operation.parameters]
        outputs = tuple(value(name) for name in operation.outputs)
        run = partial(
            getattr(implementation, operation.kernel),
            *inputs,
            out=outputs if len(outputs) > 1 else outputs[0],
            **operation.attributes,
            **({} if sms is None else {"num_sms": sms}),
        )
        rows = tuple(value(name) for name in operation.outputs if graph.values[name].kind is Kind.TOKENS)
        return KernelCall(where, run, rows)


def _zero(rows: Tensor) -> None:
    rows.zero_()


def _is_exchange(graph: Graph, operation: str) -> bool:
    return operation in graph and graph[operation].resource is Resource.NETWORK
