"""CudaProgram runs schedules on one GPU: lanes become streams, waits become events, an iteration one CUDA graph.

    lane     launches of a layer        stream    what _issue puts on it, for every layer
    compute  qkv   .     o              A         qkv, record e0 ----------------- wait e1, o
    memory   .     attn  .              B         wait e0, attn, record e1 -----------------
    network  .     .     .   reduce     C         wait e2 (after o), reduce ...

    _issue runs directly at first; under capture its kernels are the nodes of a CUDA graph, and order in a stream and
    events are the edges. There is a graph for each plan and bucket; replay() launches an iteration at once.

Streams of lanes with SMs of their own belong to green contexts. All begin behind the stream of the caller, and that one
waits for all of them at the end.

T tokens of a batch, R rows that are sampled, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanoflow_backend.runtime.binding import Binding, BoundPlan, FittedPlan, KernelCall
from nanoflow_backend.runtime.green_contexts import lane_streams
from nanoflow_backend.runtime.launch_watcher import LaunchWatcher
from nanoflow_backend.schedule.plan import Schedule

ON_GPU: dict[str, Any] = {"device": "cuda", "in_place": True, "limit_sms": True}  # options of a CudaProgram's Binding
PAD = -1  # the position of a row that is no token: kernels leave it out, and write no page for it


class CudaProgram:
    """A Program (see there) whose calls return at once.

    A batch is padded to a bucket (see `bucket`), which runs under one of the schedules for its size. The first batch of
    a bucket and a schedule runs a kernel at a time, which compiles what is not compiled yet, and is captured; later
    ones replay the capture. With `cuda_graphs` off none is captured.
    The logits of `head` are valid until its next call, on the same stream.

    Raises:
        ValueError: `cuda_graphs` with collectives that a CUDA graph cannot hold.
    """

    def __init__(self, binding: Binding, *, max_rows: int, cuda_graphs: bool = True) -> None:
        """`binding` is one ON_GPU; `max_rows` of a batch are sampled at most."""
        if cuda_graphs and not binding.collectives.capturable:
            kind = type(binding.collectives).__name__
            raise ValueError(f"cuda_graphs: expected collectives that a CUDA graph can hold, got {kind}")
        self.binding, self.max_rows = binding, max_rows
        for buffer in binding.buffers:
            buffer.zero_()  # pad rows are computed too, wherever that costs nothing: let them be numbers
        binding.slots.zero_()
        self._token_ids = torch.zeros(binding.max_tokens, dtype=torch.int32, device="cuda")
        head = binding.model.head
        self._head_values = {
            name: binding.empty(max_rows, head.values[name].width, dtype=head.values[name].dtype)
            for name in (*head.inputs, *(name for op in head.operations for name in op.outputs))
        }
        self._plan_attention = binding.kernels.plan_attention
        shared = [torch.cuda.Stream() for _ in range(max(len(plan.schedule.lanes) for plan in binding.plans) - 1)]
        self._lanes = {plan: _streams(plan.schedule, shared) for plan in binding.plans}
        self._waits = {plan: binding.waits(plan) for plan in binding.plans}
        self._cuda_graphs = cuda_graphs
        self._watcher: LaunchWatcher | None = None
        self._graphs: dict[tuple[FittedPlan, int | None], torch.cuda.CUDAGraph] = {}  # watched: one for each lap
        self._graph_pool = torch.cuda.graph_pool_handle()  # one for all: they never run together
        self._last_plan = FittedPlan(binding.plans[-1], 0)  # of the last batch

    def plan_for(self, tokens: int, decode_kv_tokens: int) -> FittedPlan:
        """See Program."""
        if tokens > self.binding.max_tokens:
            raise ValueError(f"tokens: expected at most {self.binding.max_tokens}, got {tokens}")
        return self.binding.plan_for(min(bucket(tokens), self.binding.max_tokens), decode_kv_tokens)

    def forward(
        self, plan: FittedPlan, token_ids: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor
    ) -> None:
        """See Program. Raises: ValueError, more tokens than those of the plan."""
        tokens, padded, binding = len(token_ids), plan.tokens, self.binding
        if tokens > padded:
            raise ValueError(f"token_ids: expected at most the plan's {padded} tokens, got {tokens}")
        if page_table is not binding.page_table:
            self._graphs.clear()  # and with them their pool, in which nothing can be captured again
            self._graph_pool = torch.cuda.graph_pool_handle()
            binding.page_table = page_table
        self._token_ids[:tokens].copy_(token_ids)
        binding.slots[:tokens].copy_(slots)
        binding.positions[:tokens].copy_(positions)
        binding.positions[tokens:padded].fill_(PAD)
        self._last_plan = plan
        captured = plan, self._watcher.begin(plan) if self._watcher else None
        if captured in self._graphs:
            self._graphs[captured].replay()
            return
        self._issue(plan)
        if self._cuda_graphs:
            graph = torch.cuda.CUDAGraph()
            with _uncollected(), torch.cuda.graph(graph, pool=self._graph_pool, capture_error_mode="thread_local"):
                self._issue(plan)
            self._graphs[captured] = graph

    def head(self, rows: Tensor) -> Tensor:
        """See Program. That the batch has these rows is not checked: they are on the device.

        Raises:
            ValueError: more than max_rows rows.
        """
        if len(rows) > self.max_rows:
            raise ValueError(f"rows: expected at most {self.max_rows}, got {len(rows)}")
        head = self.binding.model.head
        values = {name: value[: len(rows)] for name, value in self._head_values.items()}
        for name, result in zip(head.inputs, self.binding.results(self._last_plan), strict=True):
            torch.index_select(result, 0, rows, out=values[name])
        for call in self.binding.head(values):
            call.run()
        return values[head.outputs[0]][:, : self.binding.model.vocab_size]

    def fill(self, page_table: Tensor) -> None:
        """See Program. Runs the largest batch, of padding, under each of its plans, and the LM head on most rows."""
        self._pad(self.binding.max_tokens, page_table)
        self.head(torch.zeros(self.max_rows, dtype=torch.int32, device="cuda"))

    def warm_up(self, page_table: Tensor) -> None:
        """See Program. Runs every bucket, of padding, under every plan, the largest first."""
        self.fill(page_table)
        for tokens in sorted({bucket(tokens) for tokens in range(1, self.binding.max_tokens)}, reverse=True):
            self._pad(min(tokens, self.binding.max_tokens), page_table)

    def watch(self, watcher: LaunchWatcher | None) -> None:
        """See Program. Graphs that were captured unwatched stay, for when nobody looks on any more."""
        self._watcher = watcher

    def close(self) -> None:
        """See Program."""
        self._graphs.clear()

    def _pad(self, tokens: int, page_table: Tensor) -> None:
        """Run a batch of padding under each plan that batches of `tokens` may have."""
        ids = torch.zeros(tokens, dtype=torch.int32, device="cuda")
        asked = [plan.schedule.least_decode_kv_tokens for plan in self.binding.plans]
        for plan in dict.fromkeys(self.plan_for(tokens, least) for least in asked):
            self.forward(plan, ids, torch.full_like(ids, PAD), ids, page_table)

    def _issue(self, fitted: FittedPlan) -> None:
        """Every launch on the stream of its lane, after the events of those that it waits for."""
        (plan, tokens), main = fitted, torch.cuda.current_stream()
        streams = {lane: stream or main for lane, stream in self._lanes[plan].items()}
        waits = self._waits[plan]
        for embedding in self.binding.embed(fitted, self._token_ids[:tokens]):
            embedding.run()
        calls = self.binding.layers(fitted)
        attention_plans = self._attention_plans(plan, calls)
        start = main.record_event()
        for stream in streams.values():
            stream.wait_event(start)
        ended: dict[int, torch.cuda.Event] = {}
        awaited = {target for targets in waits for target in targets}
        kind_of = self.binding.model.kind_of
        for step, ((layer, number), call) in enumerate(zip(plan.steps, calls, strict=True)):
            stream = streams[plan.schedule.launches[number].lane]
            for target in waits[step]:
                stream.wait_event(ended[target])
            if call:
                run = partial(self._watcher.run, step, call.run) if self._watcher else call.run
                with torch.cuda.stream(stream):
                    run(**attention_plans.get((kind_of[layer], number), {}))
            if step in awaited:
                ended[step] = stream.record_event()
        for stream in streams.values():
            main.wait_event(stream.record_event())
        for completing in self.binding.complete(fitted):
            completing.run()

    def _attention_plans(
        self, plan: BoundPlan, calls: Sequence[KernelCall | None]
    ) -> dict[tuple[int, int], dict[str, Any]]:
        """By kind of layer and launch number, the keyword with attention's plan: the same in every layer of a kind."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for (layer, number), call in zip(plan.steps, calls, strict=True):
            launch, key = plan.schedule.launches[number], (self.binding.model.kind_of[layer], number)
            if call and key not in found and plan.layers[layer][launch.operation].kernel == "attention":
                q, pages, positions, slots, *_ = call.run.args
                heads = q.shape[1] // pages.shape[-1]
                window, sms = call.run.keywords.get("window", 0), plan.schedule.sms(launch)
                made = self._plan_attention(positions, slots, pages, heads, window=window, num_sms=sms)
                found[key] = {"plan": made}
        return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: it could destroy another program's graphs and so invalidate the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def bucket(tokens: int) -> int:
    """The size that a batch is padded to: a power of two up to 16, a multiple of 16 up to 256, then at most an eighth
    more than it has.

    Above 128 tokens padding stays below 12.5 %; below, a step costs the reading of the weights whatever its size, but
    for the few microseconds that make up a step of a request or two.
    """
    power = 1 << (tokens - 1).bit_length()
    grain = min(power, max(16, power // 16))
    return -(-tokens // grain) * grain


def _streams(schedule: Schedule, shared: Sequence[torch.cuda.Stream]) -> dict[str, torch.cuda.Stream | None]:
    """By lane; None is the stream that issues, `shared` are those of lanes beside it that have no SMs of their own."""
    if schedule.partition:
        return dict(lane_streams(tuple(schedule.partition.items())))
    return dict(zip(schedule.lanes, [None, *shared], strict=False))
