"""A steady batch of one rank that runs alone, a clock in place of the others: sequential, cut alone, and overlapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nanoflow_search.cost.batch_sizes import batch_mix, natural_tokens
from nanoflow_search.cost.devices import DEVICES, PowerSpec
from nanoflow_search.cost.model import ModelSize
from nanoflow_search.cost.work import COLLECTIVES
from nanoflow_search.cost.workload import MeanWorkload, Mix
from nanoflow_search.emit.timed_schedules import compare
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.predict.predict import Timing

from benchmarks.overlap.exposure import Exposure
from benchmarks.overlap.halves import nano_batch_only, overlap_network
from benchmarks.resumable import Cell
from nanoflow_backend.bench.emulation import ASSUMED_SMS, at_rate
from nanoflow_backend.bench.step_trace.launch_times import LaunchTimes
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.network_table import Collective, NetworkTable, sent_bytes
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.collectives import in_forms
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import describe, validate

SUSTAINED_POWER = DEVICES["H200-sustained"].power
WATCHED_RUNS = 8  # of a step; the last one is read, when the clock has followed


class Arm(NamedTuple):
    """A schedule on a network."""

    network: str
    schedule: Schedule


@dataclass(frozen=True)
class EmulatedRank:
    """Rank 0 of as many as `sequential_network` has, on one device. Overlapped collectives take each of `rates`, GB/s.

    `timer_of` makes a timer for batches of a mix, `watcher_of` what times the launches of its programs.
    """

    config: ModelConfig
    sequential_network: NetworkTable
    rates: tuple[float, ...]
    device: str
    device_sms: int | None
    layers: int
    timer_of: Callable[[Mix, NetworkTable], PlanTimer]
    watcher_of: Callable[[], LaunchTimes]
    precision: Precision = BFLOAT16
    power: PowerSpec = SUSTAINED_POWER

    @property
    def ranks(self) -> int:
        return self.sequential_network.header.ranks

    @property
    def graph(self) -> Graph:
        return build(self.config, self.ranks).layer

    def check(self, files: Mapping[str, ScheduleFile]) -> None:
        """Raises: ScheduleError, a file for another model, device or number of ranks."""
        model = build(self.config, self.ranks)
        for file in files.values():
            file.check_header(model, self.precision, self.device, self.ranks, self.device_sms)

    def compare(self, workload: MeanWorkload, tokens: int, files: Mapping[str, ScheduleFile], rounds: int) -> Cell:
        """Every arm of a batch, timed in turns."""
        natural = natural_tokens(ModelSize.of(self.config, self.precision), self.device, self.ranks, workload)
        mix = batch_mix(workload, tokens, natural)
        plan_name, plan = self.overlapped_plan(tokens, files)
        networks = {"measured": self.sequential_network} | {
            f"{rate:g} GB/s": at_rate(self.sequential_network.header, rate) for rate in self.rates
        }
        graph = in_forms(self.graph, plan.all_reduces, self.ranks)
        arms = {"nano-batch only": Arm("measured", nano_batch_only(graph, plan))} | {
            f"overlapped, {network}": Arm(network, plan) for network in networks if network != "measured"
        }
        for arm in arms.values():
            validate(arm.schedule, graph, self.layers, self.device_sms, ranks=self.ranks)
        first = self.timer_of(mix, self.sequential_network)
        timers = {network: first if network == "measured" else first.on(table) for network, table in networks.items()}

        def timed(arm: Arm) -> Timing:
            return timers[arm.network](arm.schedule)

        one_by_one = Arm("measured", sequential(self.graph, tokens))
        found = compare(timed, one_by_one, arms, rounds)
        cell: Cell = {
            "decode_tokens": round(mix.decode_tokens),
            "decode_context": mix.decode_context,
            "schedule": plan_name,
            "sequential": self._network_of(timers["measured"], networks["measured"], one_by_one.schedule),
            "arms": {},
        }
        for name, (network, schedule) in arms.items():
            taken = self._network_of(timers[network], networks[network], schedule)
            linked = {"over_sequential_with_links": self.gains_with_links(found[name], one_by_one.schedule, schedule)}
            cell["arms"][name] = found[name] | taken | linked
        return cell

    def overlapped_plan(self, tokens: int, files: Mapping[str, ScheduleFile]) -> tuple[str, Schedule]:
        """The plan of the overlapped arm, and its name.

        Raises:
            ValueError: files have none for such batches, or collectives with fewer SMs than they are assumed to take.
        """
        if not files:
            return "halves", overlap_network(self.graph, tokens, ASSUMED_SMS, self.device_sms or 0)
        for name, file in files.items():
            for number, plan in enumerate(file.plans):
                if plan.tokens == tokens and len(plan.lanes) > 1:
                    self._check_network_sms(f"{name}:{number}", plan)
                    return f"{name}:{number}", plan
        raise ValueError(f"{', '.join(files)}: no plan of several lanes for batches of {tokens} tokens")

    def _check_network_sms(self, name: str, plan: Schedule) -> None:
        graph = in_forms(self.graph, plan.all_reduces, self.ranks)
        for number, launch in enumerate(plan.launches):
            sms = plan.sms(launch)
            if graph[launch.operation].resource is Resource.NETWORK and sms is not None and sms < ASSUMED_SMS:
                raise ValueError(
                    f"{name}: {describe(number, launch)} has {sms} SMs, expected {ASSUMED_SMS} or more, which "
                    "collectives at an assumed rate take"
                )

    def _network_of(self, timer: PlanTimer, network: NetworkTable, schedule: Schedule) -> Cell:
        """Of a layer, in microseconds: what its collectives are to take, what they took, and what of it was exposed."""
        watcher = self.watcher_of()
        plan = timer.watch(schedule, watcher, WATCHED_RUNS)
        watcher.wait()
        asked_us = sum(network.time(*one).us for one in self._collectives(schedule))
        found = {"asked_us": asked_us, **Exposure.of(watcher.read(plan, watcher.lap), plan.bound)._asdict()}
        return {name: round(us, 1) for name, us in found.items()}

    def gains_with_links(self, entry: Mapping[str, Any], base: Schedule, plan: Schedule) -> list[float]:
        """The gain with the energy of the links, low and high, which the device here does not draw.

        Where a device is at its power cap, time follows energy: a layer takes at least its dynamic energy, that of the
        links included, over what the cap leaves beyond static power. It is an upper bound of both times: energies that
        fall with the clock are not reckoned.
        """
        limits = self.sequential_network.header.link_pj_per_byte
        assert limits is not None
        return [
            round(
                self._layer_s(entry["sequential"], base, pj_per_byte)
                / self._layer_s(entry["measured"], plan, pj_per_byte),
                4,
            )
            for pj_per_byte in limits
        ]

    def _layer_s(self, timing: Mapping[str, float], schedule: Schedule, pj_per_byte: float) -> float:
        sent = sum(sent_bytes(collective, size, self.ranks) for collective, size, _ in self._collectives(schedule))
        layer_s, static_w = 1e-6 * timing["layer_us"], self.power.static_w
        dynamic_j = 1e-3 * timing["layer_mj"] - static_w * layer_s + 1e-12 * pj_per_byte * sent
        return max(layer_s, dynamic_j / (self.power.cap_w - static_w))

    def _collectives(self, schedule: Schedule) -> Iterator[tuple[Collective, int, int | None]]:
        """Of a layer: each collective, the bytes of its whole operand, and the SMs that it may use."""
        graph, element = in_forms(self.graph, schedule.all_reduces, self.ranks), self.precision.element_bytes
        for launch in schedule.launches:
            op = graph[launch.operation]
            if op.resource is Resource.NETWORK:
                values = (graph.values[name] for name in (*op.inputs, *op.outputs))
                row_bytes = max(value.width * element(value.dtype) for value in values)
                for collective in COLLECTIVES[op.kernel]:
                    yield collective, (launch.stop - launch.start) * row_bytes, schedule.sms(launch)
