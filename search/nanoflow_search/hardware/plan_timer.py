"""The plan timer measures schedules on the GPU, in the engine's own program, on a batch of a steady state."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import msgspec
import torch
from nanoflow_kernels import reference
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.network_table import NetworkTable
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.collectives import with_parameters
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.models import weights
from nanoflow_backend.models.model import build
from nanoflow_backend.models.random_values import fill_normal
from nanoflow_backend.runtime.binding import Binding, FittedPlan, Kernels
from nanoflow_backend.runtime.collectives.emulated import Emulated
from nanoflow_backend.runtime.collectives.one_rank import OneRank
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.launch_watcher import LaunchWatcher
from nanoflow_backend.runtime.program import Program
from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.interface import Burst, PowerMeter
from nanoflow_search.hardware.steady_batch import SteadyBatch, requests_of
from nanoflow_search.hardware.sustain import WARM_UP_S, sustain
from nanoflow_search.predict.predict import Timing

DISTINCT_LAYERS = 4  # with weights and pages of their own, far larger than any cache; further layers are these again
KEPT_PROGRAMS = 4  # compiled programs that are kept, for plans that are timed in turns


class PlanTimer:
    """A `Timer` of schedules for batches of `mix`, on random weights and pages that all programs share.

    Times are those of the layers alone, ramps at the first and the last layer included; the LM head is not run.

    Args:
        make_program: called with a Binding and `max_rows`, as CudaProgram is.
        network: of a rank that is timed alone (see Emulated); None: the model has one rank.
        binding_options: such as ON_GPU; by default on the CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        mix: Mix,
        meter: PowerMeter,
        make_program: Callable[..., Any],
        burst: Callable[[Callable[[], None]], Burst],
        *,
        network: NetworkTable | None = None,
        num_layers: int | None = None,
        precision: Precision = BFLOAT16,
        page_tokens: int = 64,
        seconds: float = 1.0,
        warm_s: float = WARM_UP_S,
        sleep: Callable[[float], None] = time.sleep,
        kernels: Kernels = reference,
        **binding_options: Any,
    ) -> None:
        device = binding_options.get("device", "cpu")
        layers = num_layers or config.num_layers
        distinct = min(layers, DISTINCT_LAYERS)
        batch = SteadyBatch.of(requests_of(mix), page_tokens)
        ranks = network.header.ranks if network else 1
        self._network = network
        self._model = build(config, ranks).with_layers(layers)
        self._weights: dict[str, Tensor] = {}
        self._draw_weights = partial(weights.dummy, precision=precision, device=device)
        shape = msgspec.structs.replace(config, num_layers=distinct)
        kv_dtype: torch.dtype = getattr(torch, precision.kv)
        self._kv = KvPages.allocate(shape, batch.num_pages, page_tokens, kv_dtype, ranks, device=device)
        fill_normal(self._kv.tensor, 1.0, torch.Generator(device).manual_seed(0))
        ids = torch.randint(config.vocab_size, batch.positions.shape, generator=torch.Generator().manual_seed(0)).int()
        self._decodes = round(mix.decode_tokens)
        self._inputs = [ints.to(device) for ints in (ids, batch.positions, batch.slots, batch.page_table)]
        self._meter, self._make_program, self._burst = meter, make_program, burst
        self._seconds, self._warm_s, self._sleep = seconds, warm_s, sleep
        self._kernels, self._binding_options = kernels, {"precision": precision, **binding_options}
        self._forward = lru_cache(KEPT_PROGRAMS)(self._make_forward)

    @classmethod
    def here(cls, config: ModelConfig, mix: Mix, **options: Any) -> PlanTimer:
        """Return a timer on the first visible GPU; `options` are those of the constructor, such as num_layers."""
        from nanoflow_kernels import device as kernels

        from nanoflow_backend.runtime.cuda import ON_GPU, CudaProgram
        from nanoflow_backend.runtime.gpu_meter import GpuMeter
        from nanoflow_search.hardware.cuda_graphs import CudaBurst

        def burst(launches: Callable[[], None]) -> Burst:
            return CudaBurst(torch.cuda.current_stream(), launches)

        return cls(config, mix, GpuMeter(), CudaProgram, burst, kernels=kernels, **ON_GPU, **options)

    def on(self, network: NetworkTable) -> PlanTimer:
        """Return a timer of the same batch, weights and pages on another network of as many ranks.

        Raises:
            ValueError: the network has another number of ranks.
        """
        ranks = self._network.header.ranks if self._network else 1
        if network.header.ranks != ranks:
            raise ValueError(f"network: expected one of {ranks} ranks, got {network.header.ranks}")
        other = copy.copy(self)
        other._network = network
        other._forward = lru_cache(KEPT_PROGRAMS)(other._make_forward)
        return other

    def __call__(self, schedule: Schedule) -> Timing:
        """Return the measured timing of a layer.

        Raises:
            ValueError: the schedule is for batches of another size.
        """
        tokens = len(self._inputs[0])
        if schedule.tokens != tokens:
            raise ValueError(f"schedule: expected one for batches of {tokens} tokens, got {schedule.tokens}")
        made = self._forward(msgspec.json.encode(schedule))
        forwards = _Forwards(made.forward, self._burst, self._model.num_layers)
        used = sustain([forwards], self._meter, self._seconds, warm_s=self._warm_s, sleep=self._sleep)
        return Timing(used.call_s[0] * 1e6, used.sm_clock_mhz, used.power_w, used.power_w * used.call_s[0])

    def watch(self, schedule: Schedule, watcher: LaunchWatcher, runs: int) -> FittedPlan:
        """Run the batch under a schedule so many times while `watcher` looks on, and return the plan that ran."""
        made = self._forward(msgspec.json.encode(schedule))
        made.program.watch(watcher)
        for _ in range(runs):
            made.forward()
        made.program.watch(None)
        return made.plan

    def _make_forward(self, schedule: bytes) -> _Compiled:
        tokens, plan = len(self._inputs[0]), msgspec.json.decode(schedule, type=Schedule)
        self._add_weights(plan)
        binding = Binding(
            self._model,
            [msgspec.structs.replace(plan, least_decode_kv_tokens=0)],  # whatever the batch has
            self._weights,
            self._kv,
            self._collectives(),
            self._kernels,
            max_tokens=tokens,
            **self._binding_options,
        )
        program = self._make_program(binding, max_rows=1)
        *listed, page_table = self._inputs
        fitted = program.plan_for(tokens, decode_kv_tokens=0)
        layout = deal(self._decodes, tokens, fitted.groups)
        rows = torch.from_numpy(layout.listed).to(page_table.device) if layout else slice(None)
        inputs = [ints[rows] for ints in listed]

        def forward() -> None:
            program.forward(fitted, *inputs, page_table)

        forward()  # compiles, and captures
        return _Compiled(program, fitted, forward)

    def _add_weights(self, plan: Schedule) -> None:
        """Draw what the plan's form of the model needs and no plan before it did, in the first few layers."""
        ranks = self._network.header.ranks if self._network else 1
        model = with_parameters(self._model, [plan.all_reduces], ranks)
        names = {f"layers.{i}.{p.name}" for i, graph in enumerate(model.in_order) for p in graph.parameters}
        if names <= self._weights.keys():
            return
        distinct = min(model.num_layers, DISTINCT_LAYERS)
        drawn = self._draw_weights(model.with_layers(distinct)) | self._weights
        self._weights |= drawn | {
            name: drawn[f"layers.{i % distinct}.{p.name}"]
            for i, graph in enumerate(model.in_order)
            for p in graph.parameters
            for name in [f"layers.{i}.{p.name}"]
        }

    def _collectives(self) -> Collectives:
        return Emulated(self._network, self._kernels) if self._network else OneRank()


class _Compiled(NamedTuple):
    """A program of one schedule, and a call that runs the batch under it."""

    program: Program
    plan: FittedPlan
    forward: Callable[[], None]


class _Forwards:
    """A `RepeatedWork` of whole forward passes, whose calls are layers."""

    def __init__(self, forward: Callable[[], None], burst: Callable[[Callable[[], None]], Burst], layers: int) -> None:
        self._forward, self._burst, self.calls = forward, burst, layers

    def launch(self, after: Burst | None = None) -> Burst:
        """See RepeatedWork."""
        if after:
            after.took_s()
        return self._burst(self._forward)
