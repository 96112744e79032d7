"""The GPU runs loads for a profile. Its settings are left alone: its clock follows the power that it draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.runtime.gpu_meter import GpuMeter
from nanoflow_backend.runtime.green_contexts import Shares
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.inputs import OperationInputs, RotatingCalls
from nanoflow_search.hardware.interface import PowerMeter, RepeatedWork
from nanoflow_search.hardware.sustain import SustainedUse, idle_w, sustain
from nanoflow_search.profile.load import Load, Measurement

HEATER_TOKENS = 2048.0  # of the product that heats the GPU
HEATER_DUTY = 0.5  # duty cycle of the heater's second measurement, which shows its power at another clock
SPIN_ROUNDS = 20_000  # tens of microseconds
SECONDS = 0.6  # for which a load is measured


class GpuLoadRunner:
    """A `LoadRunner` on a GPU.

    If every load names an SM count and the counts fit, each runs in its own partition. Otherwise all share the SMs.

    `capture(calls, stream)` makes a launch repeatable on a stream (None: of the whole device). `split` makes the
    streams of a partition. `nothing` is a launch without useful work on every SM.
    """

    def __init__(
        self,
        name: str,
        sms: int,
        inputs: OperationInputs,
        meter: PowerMeter,
        capture: Callable[[RotatingCalls, Any], RepeatedWork],
        split: Callable[[Shares], Mapping[str, Any]],
        nothing: RotatingCalls,
        *,
        seconds: float = SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.sms, self.seconds = name, sms, seconds
        self.power_cap_w, self.highest_clock_mhz = meter.power_limit_w, meter.highest_sm_clock_mhz
        self._inputs, self._meter, self._capture, self._nothing = inputs, meter, capture, nothing
        self._split, self._sleep = split, sleep

    @classmethod
    def here(
        cls,
        config: ModelConfig,
        mix: Mix,
        page_tokens: int = 64,
        seconds: float = SECONDS,
        precision: Precision = BFLOAT16,
        graph: Graph | None = None,
        ranks: int = 1,
    ) -> GpuLoadRunner:
        """Return the runner on the first visible GPU, for a model's operations in batches with contexts as in `mix`.

        `graph` has the operations of one of `ranks` ranks; by default those of a layer on a single one.
        """
        from nanoflow_kernels import device as kernels

        from nanoflow_backend.runtime.green_contexts import lane_streams
        from nanoflow_search.hardware.cuda_graphs import CapturedCalls
        from nanoflow_search.hardware.spin import spin

        inputs_of: dict[str, Any] = {"page_tokens": page_tokens, "graph": graph, "ranks": ranks}
        device = find_device("cuda")
        assert device.sms is not None
        counted = torch.empty(device.sms, dtype=torch.int32, device="cuda")
        nothing = partial(spin, SPIN_ROUNDS, out=counted)
        return cls(
            device.name,
            device.sms,
            OperationInputs(config, mix, kernels, precision=precision, **inputs_of),
            GpuMeter(),
            lambda calls, stream: CapturedCalls(*calls, stream),
            lane_streams,
            RotatingCalls(lambda _: nothing(), 1),
            seconds=seconds,
        )

    @cached_property
    def static_w(self) -> float:
        """See LoadRunner."""
        return self._sustained([self._capture(self._nothing, None)]).power_w

    def time(self, loads: Sequence[Load], busy: float = 1.0, heated: bool = False) -> Measurement:
        """See LoadRunner."""
        if all(self._is_nothing(load) for load in loads):
            return Measurement((0.0,) * len(loads), self.static_w, self.highest_clock_mhz)
        works = self._works(loads)
        used = self._sustained(works, busy, self._heater if heated else None)
        power_w = used.power_w
        if busy < 1:
            rest_w = self._heater_w(used.sm_clock_mhz) if heated else self._idle_w
            power_w = (used.power_w - (1 - used.busy) * rest_w) / used.busy
        return Measurement(tuple(1e6 * s for s in used.call_s), power_w, used.sm_clock_mhz)

    def _works(self, loads: Sequence[Load]) -> list[RepeatedWork]:
        shares, lanes = partition_of(loads, self.sms)
        streams = self._split(shares) if shares else {}
        return [
            self._capture(self._inputs.calls(load), streams.get(lane)) for load, lane in zip(loads, lanes, strict=True)
        ]

    def _is_nothing(self, load: Load) -> bool:
        """Return whether a load has nothing to do: a collective of one rank is no launch."""
        name = load.operation
        return any(op.name == name and op.resource is Resource.NETWORK for op in self._inputs.graph.operations)

    def _sustained(
        self, works: Sequence[RepeatedWork], busy: float = 1.0, rest: RepeatedWork | None = None
    ) -> SustainedUse:
        # Work that takes turns is measured for longer: one burst more or less in the window falsifies its share.
        return sustain(works, self._meter, self.seconds / busy**2, busy=busy, rest=rest, sleep=self._sleep)

    @cached_property
    def _idle_w(self) -> float:
        return idle_w(self._meter, self.seconds, sleep=self._sleep)

    @cached_property
    def _heater(self) -> RepeatedWork:
        """The product with the largest weight: nothing draws more power."""
        graph = self._inputs.graph
        size = {p.name: p.shape[-1] * p.shape[-2] for p in graph.parameters if len(p.shape) > 1}
        products = [op for op in graph.operations if op.resource is Resource.COMPUTE]
        heaviest = max(products, key=lambda op: size[op.parameters[0]])
        return self._works([Load(heaviest.name, HEATER_TOKENS)])[0]

    @cached_property
    def _heater_points(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The heater's (clock, power), back to back and with pauses."""
        full = self._sustained([self._heater])
        half = self._sustained([self._heater], HEATER_DUTY)
        busy_w = (half.power_w - (1 - half.busy) * self._idle_w) / half.busy
        return (full.sm_clock_mhz, full.power_w), (half.sm_clock_mhz, busy_w)

    def _heater_w(self, clock_mhz: float) -> float:
        (low, low_w), (high, high_w) = self._heater_points
        return low_w + (high_w - low_w) * (clock_mhz - low) / (high - low) if high > low else low_w


def partition_of(loads: Sequence[Load], device_sms: int) -> tuple[Shares, list[str]]:
    """Return the partition of the device that loads ask for (lane, SMs), and the lane of each load.

    SMs that no load asks for are a lane of their own. The partition is empty if loads share SMs, or ask for more than
    there are. Lanes are ordered by size, so a load measured alone gets the same SMs as when it is measured in a pair.
    """
    asked = [load.sms for load in loads if load.sms is not None]
    rest = device_sms - sum(asked)
    if len(asked) < len(loads) or rest < 0:
        return (), [""] * len(loads)
    sizes = [*asked, rest] if rest else asked
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    shares = tuple((str(lane), sizes[number]) for lane, number in enumerate(order))
    return shares, [str(order.index(number)) for number in range(len(loads))]
