"""The synthetic device is a law of interference and power in place of a GPU, for development and tests.

Its times are roofs and no measurements: what it says of a plan says nothing about any real device.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.schedule.plan import Launch, Schedule
from nanoflow_search.cost.devices import GpuSpec
from nanoflow_search.cost.work import Work, operation_work
from nanoflow_search.cost.workload import Mix
from nanoflow_search.predict.decode_layout import count_decodes
from nanoflow_search.predict.predict import Timing, highest_clock_within_cap
from nanoflow_search.predict.simulate import LaunchPhase, Pace, simulate_launches
from nanoflow_search.profile.load import Load, Measurement, ProfileError

LAUNCH_US = 3.0
IDLE_SHARE = 0.65  # the share of static power that an idle device draws
# The share of the SMs that saturates a bandwidth: an H200 reads 4.07 of 4.57 TB/s with 32 of 132 SMs.
SATURATING_SHARE = {Resource.MEMORY: 0.25, Resource.NETWORK: 0.1}
CONTEXT = 1024.0  # of the decodes that an amount of keys stands for


class SyntheticDevice:
    """A `LoadRunner` of the rates in `spec`, with seeded noise, for a layer in `precision`.

    Arithmetic divides evenly over SMs. Few SMs saturate a bandwidth, which all loads share. The clock falls until power
    is within the cap; the dynamic energy of arithmetic grows with its square.
    """

    def __init__(
        self,
        graph: Graph,
        spec: GpuSpec,
        sms: int = 132,
        ranks: int = 1,
        noise: float = 0.005,
        seed: int = 0,
        precision: Precision = BFLOAT16,
    ) -> None:
        if spec.power is None:
            raise ProfileError(f"{spec.name}: no energies are known of it")
        self.name, self.sms = f"synthetic {spec.name}", sms
        self.static_w, self.power_cap_w = spec.power.static_w, spec.power.cap_w
        self.highest_clock_mhz = 1980.0
        self._graph, self._spec, self._power, self._ranks = graph, spec, spec.power, ranks
        self._noise, self._random, self._precision = noise, random.Random(seed), precision
        products = [op for op in graph.operations if op.resource is Resource.COMPUTE]
        product = max(products, key=lambda op: self._compute_j(self._work(Load(op.name, 2048))))
        attention = next(op for op in graph.operations if op.kernel == "attention")
        few = round(sms * SATURATING_SHARE[Resource.MEMORY])
        # The heater is a product beside attention: the cap may not bind a product alone, and the clock stay.
        self._heat = (Load(product.name, 2048, sms - few), Load(f"{attention.name}/decode", 512 * CONTEXT, few))

    def time(self, loads: Sequence[Load], busy: float = 1.0, heated: bool = False) -> Measurement:
        """See LoadRunner."""
        rest = self._heat if heated else ()

        def timed(clock_mhz: float) -> Timing:
            durations_us, power_w = self._at(loads, clock_mhz)
            rest_w = self._at(rest, clock_mhz)[1] if rest else IDLE_SHARE * self.static_w
            mean_w = busy * power_w + (1 - busy) * rest_w
            return Timing(durations_us[0], clock_mhz, mean_w, mean_w * durations_us[0] * 1e-6)

        clock_mhz = highest_clock_within_cap(timed, 1.0, self.highest_clock_mhz, self.power_cap_w).clock_mhz
        durations_us, power_w = self._at(loads, clock_mhz)
        noisy = tuple(us * self._random.lognormvariate(0, self._noise) for us in durations_us)
        return Measurement(noisy, power_w, clock_mhz)

    def time_plan(self, schedule: Schedule, mix: Mix, num_layers: int) -> Timing:
        """Return the timing of a layer under a schedule for batches of `mix`, by the law itself."""
        decodes_of = count_decodes(mix, schedule.groups)

        def phases(launch: Launch, clock_mhz: float) -> list[LaunchPhase]:
            decodes, sms = decodes_of(launch.start, launch.stop), schedule.sms(launch)
            prompts = launch.stop - launch.start - decodes
            loads = [Load(launch.operation, launch.stop - launch.start, sms)]
            if self._graph[launch.operation].kernel == "attention":
                loads = [
                    Load(f"{launch.operation}/decode", decodes * mix.decode_context, sms),
                    Load(f"{launch.operation}/prefill", prompts * mix.prefill_context, sms),
                ]
            return [LaunchPhase(*load, self._at([load], clock_mhz)[0][0]) for load in loads if load.amount]

        def timed(clock_mhz: float) -> Timing:
            def pace(running: tuple[LaunchPhase, ...]) -> Pace:
                durations_us, power_w = self._at([Load(*phase[:3]) for phase in running], clock_mhz)
                slowdowns = (us / phase.alone_us for us, phase in zip(durations_us, running, strict=True))
                return Pace(tuple(slowdowns), power_w - self.static_w)

            launches = [phases(launch, clock_mhz) for launch in schedule.launches]
            run = simulate_launches(schedule, num_layers, launches, pace)
            layer_us = run.total_us / num_layers
            layer_j = run.dynamic_j / num_layers + self.static_w * layer_us * 1e-6
            return Timing(layer_us, clock_mhz, 1e6 * layer_j / layer_us, layer_j)

        found = highest_clock_within_cap(timed, 1.0, self.highest_clock_mhz, self.power_cap_w)
        slower = self._random.lognormvariate(0, self._noise)
        return Timing(found.layer_us * slower, found.clock_mhz, found.power_w, found.layer_j * slower)

    def _at(self, loads: Sequence[Load], clock_mhz: float) -> tuple[list[float], float]:
        """Return the durations in us and the power in W of loads side by side at a clock, without noise."""
        works = [self._work(load) for load in loads]
        asked = [load.sms or self.sms for load in loads]
        granted = [sms * min(1.0, self.sms / sum(asked)) / self.sms for sms in asked]
        alone = [self._duration_us(work, share, clock_mhz, 1.0) for work, share in zip(works, granted, strict=True)]
        demand = sum(w.memory_bytes / (us * 1e-6) for w, us in zip(works, alone, strict=True))
        crowd = max(1.0, demand / self._spec.memory_bytes_per_s)
        beside = [self._duration_us(work, share, clock_mhz, crowd) for work, share in zip(works, granted, strict=True)]
        watts = (
            self._dynamic_j(load, work, clock_mhz) / (us * 1e-6)
            for load, work, us in zip(loads, works, beside, strict=True)
        )
        return beside, self.static_w + sum(watts)

    def _duration_us(self, work: Work, share: float, clock_mhz: float, crowd: float) -> float:
        spec = self._spec
        compute_s = spec.compute_s(work.flop, work.fp8_flop) / (share * clock_mhz / self.highest_clock_mhz)
        reading = min(1.0, share / SATURATING_SHARE[Resource.MEMORY])
        sending = min(1.0, share / SATURATING_SHARE[Resource.NETWORK])
        memory_s = crowd * work.memory_bytes / (spec.memory_bytes_per_s * reading)
        network_s = work.network_bytes / (spec.network_bytes_per_s * sending)
        return LAUNCH_US + 1e6 * max(compute_s, memory_s, network_s)

    def _dynamic_j(self, load: Load, work: Work, clock_mhz: float) -> float:
        match self._graph[load.operation.partition("/")[0]].resource:
            case Resource.COMPUTE:
                return self._compute_j(work) * (clock_mhz / self.highest_clock_mhz) ** 2
            case Resource.MEMORY:
                return work.memory_bytes * self._power.j_per_byte
            case Resource.NETWORK:
                return work.network_bytes * self._power.j_per_network_byte

    def _compute_j(self, work: Work) -> float:
        return self._power.compute_j(work.flop, work.fp8_flop)

    def _work(self, load: Load) -> Work:
        name, _, phase = load.operation.partition("/")
        if name not in {op.name for op in self._graph.operations}:
            raise ProfileError(f"{load.operation}: the model has no such operation")
        mixes = {
            "": Mix(0, load.amount, 0, CONTEXT),
            "decode": Mix(load.amount / CONTEXT, 0, CONTEXT, 0),
            "prefill": Mix(0, load.amount / CONTEXT, 0, CONTEXT),
        }
        return operation_work(self._graph, self._graph[name], mixes[phase], self._ranks, self._precision)
