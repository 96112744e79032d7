"""GpuDevice: a GPU as a Device of the profiler. Its settings are left alone: its clock follows the power it draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import torch

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.runtime.device import find_device
from nanoflow_backend.runtime.gpu_meter import GpuMeter, GpuReading
from nanoflow_backend.runtime.green_contexts import Shares
from nanoflow_search.cost.work import Mix
from nanoflow_search.hardware.inputs import Calls, Operands
from nanoflow_search.hardware.sustain import Repeated, Used, idle_w, sustain
from nanoflow_search.profile.data import Load, Measurement

HEAT_TOKENS = 2048.0  # of the product that heats
SPIN_ROUNDS = 20_000  # tens of microseconds
HALF = 0.5
SECONDS = 0.6  # that a load works while it is measured


class PowerMeter(Protocol):
    @property
    def power_limit_w(self) -> float: ...

    @property
    def highest_sm_clock_mhz(self) -> float: ...

    def read(self) -> GpuReading: ...


class Source(Protocol):
    """Of the calls of loads: Operands."""

    @property
    def graph(self) -> Graph: ...

    def calls(self, load: Load) -> Calls: ...


class GpuDevice:
    """See Device. Loads that all have SMs, which there are, run on those alone, as lanes of a partition do.

    `capture` makes of a launch what can be repeated on a stream (None: of the whole device), `split` the streams of a
    partition; `nothing` is a launch without work on every SM.
    """

    def __init__(
        self,
        name: str,
        sms: int,
        operands: Source,
        meter: PowerMeter,
        capture: Callable[[Calls, Any], Repeated],
        split: Callable[[Shares], Mapping[str, Any]],
        nothing: Calls,
        *,
        seconds: float = SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name, self.sms, self.seconds = name, sms, seconds
        self.power_cap_w, self.highest_clock_mhz = meter.power_limit_w, meter.highest_sm_clock_mhz
        self._operands, self._meter, self._capture, self._nothing = operands, meter, capture, nothing
        self._split, self._sleep = split, sleep

    @classmethod
    def here(
        cls,
        config: ModelConfig,
        mix: Mix,
        page_tokens: int = 64,
        seconds: float = SECONDS,
        precision: Precision = BFLOAT16,
    ) -> GpuDevice:
        """The first GPU that is visible, for a model's operations in batches of `mix`'s contexts."""
        from nanoflow_kernels import device as kernels

        from nanoflow_backend.runtime.green_contexts import lane_streams
        from nanoflow_search.hardware.cuda_graphs import Captured
        from nanoflow_search.hardware.spin import spin

        device = find_device("cuda")
        assert device.sms is not None
        counted = torch.empty(device.sms, dtype=torch.int32, device="cuda")
        nothing = partial(spin, SPIN_ROUNDS, out=counted)
        operands = Operands(config, mix, kernels, page_tokens=page_tokens, precision=precision)
        calls = Calls(lambda _: nothing(), 1)
        return cls(
            device.name, device.sms, operands, GpuMeter(), lambda c, stream: Captured(*c, stream), lane_streams, calls,
            seconds=seconds,
        )  # fmt: skip

    @cached_property
    def static_w(self) -> float:
        return self._sustained([self._capture(self._nothing, None)]).power_w

    def time(self, loads: Sequence[Load], busy: float = 1.0, heated: bool = False) -> Measurement:
        """See Device."""
        if all(self._is_idle(load) for load in loads):
            return Measurement((0.0,) * len(loads), self.static_w, self.highest_clock_mhz)
        works = self._works(loads)
        used = self._sustained(works, busy, self._heater if heated else None)
        power_w = used.power_w
        if busy < 1:
            rest_w = self._heat_w(used.sm_clock_mhz) if heated else self._idle_w
            power_w = (used.power_w - (1 - used.busy) * rest_w) / used.busy
        return Measurement(tuple(1e6 * s for s in used.call_s), power_w, used.sm_clock_mhz)

    def _works(self, loads: Sequence[Load]) -> list[Repeated]:
        shares, lanes = partition_of(loads, self.sms)
        streams = self._split(shares) if shares else {}
        return [
            self._capture(self._operands.calls(load), streams.get(lane))
            for load, lane in zip(loads, lanes, strict=True)
        ]

    def _is_idle(self, load: Load) -> bool:
        """A collective of one rank is no launch."""
        name = load.operation
        return any(op.name == name and op.resource is Resource.NETWORK for op in self._operands.graph.operations)

    def _sustained(self, works: Sequence[Repeated], busy: float = 1.0, rest: Repeated | None = None) -> Used:
        # Longer where it takes turns: by a burst more or less in the window its share is told wrong.
        return sustain(works, self._meter, self.seconds / busy**2, busy=busy, rest=rest, sleep=self._sleep)

    @cached_property
    def _idle_w(self) -> float:
        return idle_w(self._meter, self.seconds, sleep=self._sleep)

    @cached_property
    def _heater(self) -> Repeated:
        """The product with the largest weight: nothing draws more power."""
        graph = self._operands.graph
        size = {p.name: p.shape[-1] * p.shape[-2] for p in graph.parameters if len(p.shape) > 1}
        products = [op for op in graph.operations if op.resource is Resource.COMPUTE]
        heaviest = max(products, key=lambda op: size[op.parameters[0]])
        return self._works([Load(heaviest.name, HEAT_TOKENS)])[0]

    @cached_property
    def _heats(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The heater's clock and power, back to back and half of the time."""
        full = self._sustained([self._heater])
        half = self._sustained([self._heater], HALF)
        busy_w = (half.power_w - (1 - half.busy) * self._idle_w) / half.busy
        return (full.sm_clock_mhz, full.power_w), (half.sm_clock_mhz, busy_w)

    def _heat_w(self, clock_mhz: float) -> float:
        (low, low_w), (high, high_w) = self._heats
        return low_w + (high_w - low_w) * (clock_mhz - low) / (high - low) if high > low else low_w


def partition_of(loads: Sequence[Load], device_sms: int) -> tuple[Shares, list[str]]:
    """All of the device's SMs in shares that the loads and the rest have, and each load's lane; none if loads share.

    Lanes are numbered from the smallest, so that a load that leaves the rest to nobody runs in the partition that it
    has beside another one.
    """
    asked = [load.sms for load in loads if load.sms is not None]
    rest = device_sms - sum(asked)
    if len(asked) < len(loads) or rest < 0:
        return (), [""] * len(loads)
    sizes = [*asked, rest] if rest else asked
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    shares = tuple((str(lane), sizes[number]) for lane, number in enumerate(order))
    return shares, [str(order.index(number)) for number in range(len(loads))]
