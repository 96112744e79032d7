"""The inputs of an operation are random data on the device; launches rotate through several sets of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.graph.operation import Graph, Kind, Operation, Parameter, Resource, ScaleOf, Value
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.models.model import build
from nanoflow_backend.models.random_values import FP8_DEVIATION, fill_normal
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.steady_batch import SteadyBatch, decode_requests, prompt_requests
from nanoflow_search.profile.load import Load, ProfileError

DEVIATION = 0.02  # of weights
SETS = 4
COLD_BYTES = 500e6  # sets that take more than this together are enough: none is in a cache when its turn comes


class RotatingCalls(NamedTuple):
    """A launch on several sets of inputs: call(i) launches on set i of `sets`."""

    call: Callable[[int], Any]
    sets: int


class OperationInputs:
    """Makes launches of a model's operations on random inputs.

    Inputs written by the previous operation stay L2-warm, all others are rotated so that they are cold, as in the
    engine. Decodes have contexts around `mix.decode_context`; tokens of prompts attend to `mix.prefill_context` on
    average.
    """

    def __init__(
        self,
        config: ModelConfig,
        mix: Mix,
        kernels: ModuleType | SimpleNamespace,
        *,
        page_tokens: int = 64,
        precision: Precision = BFLOAT16,
        device: str = "cuda",
        graph: Graph | None = None,
        ranks: int = 1,
    ) -> None:
        """`graph` has the operations of one of `ranks` ranks; by default those of a layer on a single one."""
        self.graph = graph or build(config, ranks).layer
        self._ranks = ranks
        self._config, self._mix, self._kernels = config, mix, kernels
        self._page_tokens, self._device = page_tokens, device
        self._precision = precision
        self._parameters = {p.name: p for p in self.graph.parameters}
        self._scales = {op.outputs[-1] for op in self.graph.operations if op.kernel.endswith("quantise")}
        self._generator = torch.Generator(device).manual_seed(0)

    def calls(self, load: Load) -> RotatingCalls:
        """Return launches of a load.

        Raises:
            ProfileError: the model has no such operation.
        """
        name, _, phase = load.operation.partition("/")
        if name not in {op.name for op in self.graph.operations}:
            raise ProfileError(f"{load.operation}: the model has no such operation")
        operation, batch = self.graph[name], self._batch(phase, load.amount)
        rows = len(batch.positions)
        shared = {
            "positions": batch.positions.to(self._device),
            "slots": batch.slots.to(self._device),
            "page_table": batch.page_table.to(self._device),
        }
        written = [v for v in operation.outputs if self.graph.values[v].kind is Kind.TOKENS]
        for value in (*self._written_before(operation), *written):
            shared[value] = self._random(self.graph.values[value], rows, batch.num_pages, operation)
        first, cold_bytes = self._bound(operation, shared, batch, load.sms)
        sets = max(1, min(SETS, math.ceil(COLD_BYTES / max(cold_bytes, 1))))
        runs = [first, *(self._bound(operation, shared, batch, load.sms)[0] for _ in range(sets - 1))]
        return RotatingCalls(lambda i: runs[i](), sets)

    def _batch(self, phase: str, amount: float) -> SteadyBatch:
        mix = self._mix
        match phase:
            case "decode":
                count = max(1, round(amount / mix.decode_context))
                requests = decode_requests(count, amount / count)
            case "prefill":
                requests = prompt_requests(max(1, round(amount / mix.prefill_context)), mix.prefill_context)
            case _:
                requests = prompt_requests(round(amount), mix.prefill_context)
        return SteadyBatch.of(requests, self._page_tokens)

    def _bound(
        self, operation: Operation, shared: dict[str, Tensor], batch: SteadyBatch, sms: int | None
    ) -> tuple[partial[None], int]:
        """Return a launch on a new set of inputs, and the bytes of that set."""
        rows, own = len(batch.positions), {}
        for value in (*operation.inputs, *operation.outputs):
            if value not in shared:
                own[value] = self._random(self.graph.values[value], rows, batch.num_pages, operation)
        parameters = [self._parameter(self._parameters[name]) for name in operation.parameters]
        values = shared | own
        options: dict[str, Any] = dict(operation.attributes)
        if sms is not None:
            options["num_sms"] = sms
        if operation.kernel == "attention":
            q, pages, positions, slots, _ = (values[v] for v in operation.inputs)
            heads = q.shape[1] // pages.shape[-1]
            window = options.get("window", 0)
            options["plan"] = self._kernels.plan_attention(positions, slots, pages, heads, window=window, num_sms=sms)
        out = tuple(values[v] for v in operation.outputs)
        kernel = getattr(self._kernels, operation.kernel)
        inputs = (values[v] for v in operation.inputs)
        run = partial(kernel, *inputs, *parameters, out=out if len(out) > 1 else out[0], **options)
        return run, sum(tensor.nbytes for tensor in (*own.values(), *parameters))

    def _written_before(self, operation: Operation) -> list[str]:
        """Return the inputs that the launch before this one writes. Collectives of one rank are no launches."""
        graph = self.graph
        same = {op.outputs[0]: op.inputs[0] for op in graph.operations if op.resource is Resource.NETWORK}
        launched = [op for op in graph.operations if op.resource is not Resource.NETWORK]
        before = launched[launched.index(operation) - 1] if operation in launched else operation
        found = []
        for value in operation.inputs:
            source = graph.carried.get(value, value)
            source = same.get(source, source)
            if source in before.outputs and graph.values[value].kind is Kind.TOKENS:
                found.append(value)
        return found

    def _random(self, value: Value, rows: int, num_pages: int, user: Operation) -> Tensor:
        if value.kind is Kind.PAGES:
            one_layer = replace(self._config, num_layers=1)
            dtype = self._dtype(value.dtype)
            made = KvPages.allocate(one_layer, num_pages, self._page_tokens, dtype, self._ranks, device=self._device)
            return fill_normal(made.layer(0), 1.0, self._generator)
        aligned = 16 // self._precision.element_bytes(value.dtype)
        width = 1 if value.width == 1 else -(-value.width // aligned) * aligned  # as the engine's buffers have it
        tensor = torch.empty(rows, width, dtype=self._dtype(value.dtype), device=self._device)[:, : value.width]
        if value.dtype == "int32":  # experts
            experts = self._parameters[user.parameters[0]].shape[0] if user.parameters else 1
            return tensor.random_(0, experts, generator=self._generator)
        if value.name in self._scales:
            return tensor.fill_(1 / FP8_DEVIATION)
        return fill_normal(tensor, generator=self._generator)

    def _parameter(self, parameter: Parameter) -> Tensor:
        """Return a parameter with values as `weights.dummy` draws them: values change the power that a GPU draws."""
        if parameter.constant is not None:
            return torch.tensor(parameter.constant, dtype=torch.float32, device=self._device)
        made = torch.ones(parameter.shape, dtype=self._dtype(parameter.dtype), device=self._device)
        match parameter.scale:
            case ScaleOf.WEIGHT:
                return made.fill_(DEVIATION / FP8_DEVIATION)
            case ScaleOf.INPUT:
                return made.fill_(1 / FP8_DEVIATION)
            case ScaleOf.KV:
                return made
        if parameter.name.endswith("norm.weight"):
            return made
        return fill_normal(made, None if parameter.dtype == FP8 else DEVIATION, self._generator)

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self._precision.dtype(name))
        return dtype
