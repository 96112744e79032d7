"""CpuProgram runs schedules launch by launch in plain torch: the default of laptops, and the oracle of other programs.

T tokens of a batch, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial

import torch
from torch import Tensor

from nanoflow_backend.runtime.binding import Binding, FittedPlan, KernelCall
from nanoflow_backend.runtime.launch_watcher import LaunchWatcher
from nanoflow_backend.runtime.tags import RowTags, StaleRead

CACHED_BATCH_SIZES = 64  # bound launches of one batch size are about 0.3 MB in a model of 4 layers with 3 nano-batches


class CpuProgram:
    """A Program (see there) whose activations lie in buffers shared by lifetime, with tags on their rows.

    Schedules are not validated here: a launch whose input is not there raises StaleRead. With `checked`, buffers are
    poisoned (NaN, or the lowest int) before each forward and outputs before each launch, and poison in an output raises
    too: a kernel read what it should not, or left rows unwritten.
    """

    def __init__(self, binding: Binding, *, checked: bool = False) -> None:
        self.binding, self.checked = binding, checked
        self.tags_of = {plan: RowTags(plan.layers, plan.schedule, plan.buffers) for plan in binding.plans}
        self.plan = FittedPlan(binding.plans[-1], 0)  # of the last batch
        self._watcher: LaunchWatcher | None = None
        for buffer in binding.buffers:
            buffer.fill_(_poison(buffer.dtype))
        # Launches are bound to their tensors once per plan and batch size, so what changes from step to step is copied.
        self._launches = lru_cache(CACHED_BATCH_SIZES)(self._bind)

    @property
    def tags(self) -> RowTags:
        """Of the last batch's plan."""
        return self.tags_of[self.plan.bound]

    def plan_for(self, tokens: int, decode_kv_tokens: int) -> FittedPlan:
        """See Program."""
        if tokens > self.binding.max_tokens:
            raise ValueError(f"tokens: expected at most {self.binding.max_tokens}, got {tokens}")
        return self.binding.plan_for(tokens, decode_kv_tokens)

    def forward(
        self,
        plan: FittedPlan,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        page_table: Tensor,
        order: Iterable[int] | None = None,
    ) -> None:
        """See Program. `order` is another interleaving of the steps of the batch's schedule than the order of issue.

        Raises:
            ValueError: other tokens than those of the plan.
            StaleRead: the schedule or the buffer plan is wrong.
        """
        tokens, binding = len(token_ids), self.binding
        if tokens != plan.tokens:
            raise ValueError(f"token_ids: expected the plan's {plan.tokens} tokens, got {tokens}")
        if page_table is not binding.page_table:
            self._launches.cache_clear()
            binding.page_table = page_table
        binding.positions[:tokens] = positions
        binding.slots[:tokens] = slots
        self.plan = plan
        if self._watcher:
            self._watcher.begin(plan)
        if self.checked:
            for buffer in binding.buffers:
                buffer.fill_(_poison(buffer.dtype))
        for call in binding.embed(plan, token_ids):
            self._ready(call)()
        self.tags.embed()
        launches = self._launches(plan)
        check = self.tags.launch
        for step in range(len(launches)) if order is None else order:
            check(step)
            launches[step]()
        for call in binding.complete(plan):
            self._ready(call)()

    def head(self, rows: Tensor) -> Tensor:
        """See Program.

        Raises:
            IndexError: a row that the last batch does not have.
            StaleRead: the schedule or the buffer plan is wrong.
        """
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self.plan.tokens:
            raise IndexError(f"rows: expected 0..{self.plan.tokens - 1}, got {rows.tolist()}")
        self.tags.read_results()
        graph, results = self.binding.model.head, self.binding.results(self.plan)
        values = {name: result[rows] for name, result in zip(graph.inputs, results, strict=True)}
        for call in self.binding.head(values):
            self._ready(call)()
        return values[graph.outputs[0]][:, : self.binding.model.vocab_size]

    def fill(self, page_table: Tensor) -> None:
        """See Program. Buffers are allocated, and the host pages what else a kernel takes."""

    def warm_up(self, page_table: Tensor) -> None:
        """See Program. There is nothing to compile."""

    def watch(self, watcher: LaunchWatcher | None) -> None:
        """See Program."""
        self._watcher = watcher
        self._launches.cache_clear()

    def close(self) -> None:
        """See Program. Nothing is captured."""

    def _bind(self, plan: FittedPlan) -> list[Callable[[], None]]:
        launches = [self._ready(call) if call else None for call in self.binding.layers(plan)]
        if watcher := self._watcher:
            launches = [partial(watcher.run, step, run) if run else None for step, run in enumerate(launches)]
        return [run or _nothing for run in launches]

    def _ready(self, call: KernelCall) -> Callable[[], None]:
        return partial(_checked, call) if self.checked else call.run


def _checked(call: KernelCall) -> None:
    for output in call.rows:
        output.fill_(_poison(output.dtype))
    call.run()
    for output in call.rows:
        if (output.isnan() if output.is_floating_point() else output == _poison(output.dtype)).any():
            raise StaleRead(f"{call.where} leaves poison in its output: it read, or did not write, some row")


def _poison(dtype: torch.dtype) -> float | int:
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def _nothing() -> None:
    """A launch whose range is empty at this batch size."""
