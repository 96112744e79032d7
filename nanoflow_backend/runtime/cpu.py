"""CpuProgram: a schedule, launch by launch, in plain torch: the development default, and the oracle of other programs.

T tokens of a batch, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from types import ModuleType, SimpleNamespace

import torch
from nanoflow_kernels import reference
from torch import Tensor

from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Graph, Kind, Model, Operation, Resource
from nanoflow_backend.runtime.buffers import Instance, instance_of, plan_buffers
from nanoflow_backend.runtime.collectives import Collectives
from nanoflow_backend.runtime.tags import RowTags, StaleRead
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.validate import describe

CACHED_BATCH_SIZES = 64  # bound launches of one batch size are about 0.3 MB in a model of 4 layers with 3 nano-batches


class CpuProgram:
    """A Program (see there) whose activations lie in buffers shared by lifetime, with tags on their rows.

    weights: by parameter name, those of layer i as "layers.{i}.{name}"; kv: by layer, [pages, 2, kv heads,
    page_tokens, head_dim]. The schedule is not validated here: a launch whose input is not there raises StaleRead.
    With `checked`, buffers are poisoned (NaN, or the lowest int) before each forward and outputs before each launch,
    and poison in an output raises too: a kernel read what it should not, or left rows unwritten.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        weights: Mapping[str, Tensor],
        kv: Sequence[Tensor] | Tensor,
        collectives: Collectives,
        *,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        kernels: ModuleType | SimpleNamespace = reference,
        checked: bool = False,
    ) -> None:
        if max_tokens > schedule.tokens:
            raise ValueError(f"max_tokens: expected at most the schedule's {schedule.tokens}, got {max_tokens}")
        self.model, self.schedule, self.weights, self.kv = model, schedule, weights, kv
        self.layer = split_all_reduce(model.layer, schedule.split_all_reduces, collectives.ranks)
        self.collectives, self.kernels, self.checked, self.max_tokens = collectives, kernels, checked, max_tokens
        self.dtypes = {"activation": dtype, "float32": torch.float32, "int32": torch.int32}
        self.plan = plan_buffers(self.layer, schedule, model.num_layers)
        self.tags = RowTags(self.layer, schedule, model.num_layers, self.plan)
        self.tokens = 0  # of the last batch
        self._buffers = [torch.empty(max_tokens, b.width, dtype=self.dtypes[b.dtype]) for b in self.plan.buffers]
        for buffer in self._buffers:
            buffer.fill_(_poison(buffer.dtype))
        # Launches are bound to their tensors once per batch size, so what changes from step to step is copied here.
        self._positions = torch.empty(max_tokens, dtype=torch.int32)
        self._slots = torch.empty(max_tokens, dtype=torch.int32)
        self._page_table: Tensor | None = None
        self._launches = lru_cache(CACHED_BATCH_SIZES)(self._bind)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        page_table: Tensor,
        order: Iterable[int] | None = None,
    ) -> None:
        """See Program. `order` is another interleaving of the schedule's steps than the order of issue.

        Raises:
            ValueError: more than max_tokens tokens.
            StaleRead: the schedule or the buffer plan is wrong.
        """
        tokens = len(token_ids)
        if tokens > self.max_tokens:
            raise ValueError(f"token_ids: expected at most {self.max_tokens} tokens, got {tokens}")
        if page_table is not self._page_table:
            self._launches.cache_clear()
            self._page_table = page_table
        self._positions[:tokens] = positions
        self._slots[:tokens] = slots
        self.tokens = tokens
        if self.checked:
            for buffer in self._buffers:
                buffer.fill_(_poison(buffer.dtype))
        embedded = {
            name: self._rows(Instance(-1, value), 0, tokens)
            for name, value in zip(self.model.embed.outputs, self.layer.outputs, strict=True)
        }
        self._run(self.model.embed, {self.model.embed.inputs[0]: token_ids, **embedded})
        self.tags.embed()
        launches = self._launches(tokens)
        check = self.tags.launch
        for step in range(len(launches)) if order is None else order:
            check(step)
            launches[step]()

    def head(self, rows: Tensor) -> Tensor:
        """See Program.

        Raises:
            IndexError: a row that the last batch does not have.
            StaleRead: the schedule or the buffer plan is wrong.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.tokens:
            raise IndexError(f"rows: expected 0..{self.tokens - 1}, got {rows.tolist()}")
        self.tags.read_results()
        last = self.model.num_layers - 1
        outputs = (self._rows(Instance(last, value), 0, self.tokens) for value in self.layer.outputs)
        inputs = {name: output[rows] for name, output in zip(self.model.head.inputs, outputs, strict=True)}
        return self._run(self.model.head, inputs)[:, : self.model.vocab_size]

    def _run(self, graph: Graph, values: dict[str, Tensor]) -> Tensor:
        """All of a graph on whole tensors. Outputs that are not among `values` are allocated; the first is returned."""
        count = len(values[graph.inputs[0]])
        for operation in graph.operations:
            for name in operation.outputs:
                if name not in values:
                    value = graph.values[name]
                    values[name] = torch.empty(count, value.width, dtype=self.dtypes[value.dtype])
            self._call(graph, operation, values.__getitem__, "", operation.name)()
        return values[graph.outputs[0]]

    def _bind(self, tokens: int) -> list[Callable[[], None]]:
        """The kernel call of each step on a batch of `tokens`."""
        ranges = self.schedule.fit(tokens)
        calls = []
        for layer, number in self.tags.steps:
            start, stop = ranges[number]
            launch = self.schedule.launches[number]
            rows = partial(self._value, layer, start=start, stop=stop)
            where = f"{describe(number, launch)} in layer {layer}"
            call = self._call(self.layer, self.layer[launch.operation], rows, f"layers.{layer}.", where)
            calls.append(call if start < stop else _nothing)
        return calls

    def _value(self, layer: int, name: str, start: int, stop: int) -> Tensor:
        """What a launch of `layer` on rows start .. stop - 1 means by a value's name."""
        if name == "page_table":
            assert self._page_table is not None
            return self._page_table
        if self.layer.values[name].kind is Kind.PAGES:
            return self.kv[layer]
        if name in ("positions", "slots"):
            return (self._positions if name == "positions" else self._slots)[start:stop]
        return self._rows(instance_of(self.layer, layer, name), start, stop)

    def _rows(self, instance: Instance, start: int, stop: int) -> Tensor:
        return self._buffers[self.plan.holder[instance]][start:stop, : self.layer.values[instance.value].width]

    def _call(
        self, graph: Graph, operation: Operation, value: Callable[[str], Tensor], prefix: str, where: str
    ) -> Callable[[], None]:
        implementation = self.collectives if operation.resource is Resource.NETWORK else self.kernels
        inputs = [value(name) for name in operation.inputs] + [self.weights[prefix + p] for p in operation.parameters]
        outputs = tuple(value(name) for name in operation.outputs)
        call = partial(
            getattr(implementation, operation.kernel),
            *inputs,
            out=outputs if len(outputs) > 1 else outputs[0],
            **operation.attributes,
        )
        if not self.checked:
            return call
        # Pages hold what earlier steps wrote: they are not this launch's to poison.
        rows = [value(name) for name in operation.outputs if graph.values[name].kind is Kind.TOKENS]
        return partial(_checked, call, rows, where)


def _checked(call: Callable[[], None], outputs: Sequence[Tensor], where: str) -> None:
    for output in outputs:
        output.fill_(_poison(output.dtype))
    call()
    for output in outputs:
        if (output.isnan() if output.is_floating_point() else output == _poison(output.dtype)).any():
            raise StaleRead(f"{where} leaves poison in its output: it read, or did not write, some row")


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _nothing() -> None:
    """A launch whose range is empty at this batch size."""
