"""The arms of `python -m benchmarks emulated-tp`: their plans, networks and labels, on a device that is made up."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from msgspec.structs import replace
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import MeanWorkload, Mix
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.predict.predict import Timing
from support.models.shapes import CONFIGS, config
from support.simulated.overlap_machine import H200
from support.simulated.programs import Programs

from benchmarks.overlap import emulated_tp
from benchmarks.overlap.exposure import Exposure
from benchmarks.overlap.halves import nano_batch_only, overlap_network
from nanoflow_backend.bench.step_trace.launch_times import ClockedLaunches, LaunchTime
from nanoflow_backend.config.network_table import NetworkHeader, NetworkTable
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.graph.collectives import AllReduceForm, in_forms
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.binding import BoundPlan, FittedPlan
from nanoflow_backend.runtime.buffers import BufferPlan
from nanoflow_backend.runtime.collectives.emulated import Emulated
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate


def bound(schedule: Schedule, graph: Graph) -> BoundPlan:
    """Of a model of three layers."""
    return BoundPlan(schedule, (graph,) * 3, schedule.unroll(3), BufferPlan((), {}))


SHARD = build(read_model_config(emulated_tp.HOUSE / "models/llama-3-70b"), 8)
SHARD_PLAN = FittedPlan(bound(sequential(SHARD.layer, 2048), SHARD.layer), 2048)
POWER = DEVICES["H200-sustained"].power
TP2 = NetworkHeader(name="two", device="cpu", ranks=2, source="a test", link_pj_per_byte=(210, 430), rank_skew=(0, 0.1))


@pytest.mark.parametrize("graph", [SHARD.layer, *(build(config(name), 2).layer for name in CONFIGS)])
def test_no_part_comes_right_behind_the_collective_that_it_reads(graph: Graph) -> None:
    plan = overlap_network(graph, 4096, 8, 132)
    validate(plan, graph, 80, 132, ranks=8)
    assert plan.partition == {"network": 8, "compute": 124}
    network = [op.name for op in graph.operations if op.resource is Resource.NETWORK]
    assert {launch.operation for launch in plan.launches if launch.lane == "network"} == set(network)
    steps = plan.unroll(6)
    places = {(layer, plan.launches[number].nano): place for place, (layer, number) in enumerate(steps)}
    for place, (layer, number) in enumerate(steps):
        nano = plan.launches[number].nano
        if nano.operation not in network or layer in (0, 5):  # at the ends there is no other half
            continue
        after = graph.operations[[op.name for op in graph.operations].index(nano.operation) + 1 :]
        reader = nano._replace(operation=after[0].name) if after else nano._replace(operation=graph.operations[0].name)
        at = places[layer + (not after), reader]
        between = [plan.launches[steps[k][1]] for k in range(place + 1, at)]
        assert {(launch.start, launch.stop) for launch in between} - {(nano.start, nano.stop)}, "the other half's"
    alone = nano_batch_only(graph, plan)
    validate(alone, graph, 80, 132)
    assert alone.lanes == ("compute",)


def rank(rates: tuple[float, ...] = (1.0, 2.0), **fields: Any) -> tuple[emulated_tp.EmulatedRank, list[Programs]]:
    """Rank 0 of a tiny model on programs that compute, whose time is that of their launches."""
    made: list[Programs] = []
    shape = config("llama", num_layers=2)

    def timer_of(mix: Mix, network: NetworkTable) -> PlanTimer:
        made.append(programs := Programs(layers=2))
        return PlanTimer(
            shape, mix, programs.gpu, programs, programs.burst, network=network, page_tokens=16, seconds=0.1,
            warm_s=0.05, num_layers=2, precision=FLOAT32, device="cpu", sleep=programs.gpu.sleep,
        )  # fmt: skip

    measured = NetworkTable.at_rate(TP2, 24, 3.0)
    options = {"device": "cpu", "device_sms": 12, "layers": 2, "precision": FLOAT32} | fields
    options |= {"watcher_of": ClockedLaunches}
    return emulated_tp.EmulatedRank(shape, measured, rates, timer_of=timer_of, **options), made


def test_arms_are_one_shard_on_several_networks() -> None:
    bench, made = rank()
    cell = bench.compare(MeanWorkload.parse("60/20"), 256, {}, 2)
    assert list(cell["arms"]) == ["nano-batch only", "overlapped, 1 GB/s", "overlapped, 2 GB/s"]
    assert cell["schedule"] == "halves"
    (programs,) = made
    base, alone, slow, fast = (program.binding for program in programs.made)
    assert len({id(binding.weights) for binding in (base, alone, slow, fast)}) == 1
    networks = []
    for binding in (base, alone, slow, fast):
        assert isinstance(binding.collectives, Emulated)
        networks.append(binding.collectives.table.time("all_reduce", 2**20))
    assert [sms for _, sms in networks] == [24, 24, 8, 8]
    assert [us for us, _ in networks] == pytest.approx([2**20 / gb / 1e3 for gb in (3, 3, 1, 2)])
    assert [len(binding.plans[0].schedule.lanes) for binding in (base, alone, slow, fast)] == [1, 1, 2, 2]
    assert alone.model.layer == build(config("llama"), 2).layer
    asked = {name: arm["asked_us"] for name, arm in {"sequential": cell["sequential"], **cell["arms"]}.items()}
    layer = 2 * 256 * 16 * 4 / 1e3  # of two all-reduces, each of which sends half of its bytes twice
    rates = {"sequential": 3, "nano-batch only": 3, "overlapped, 1 GB/s": 1, "overlapped, 2 GB/s": 2}
    assert asked == {name: pytest.approx(layer / gb, abs=0.1) for name, gb in rates.items()}
    for arm in (cell["sequential"], *cell["arms"].values()):
        assert arm["network_us"] >= arm["asked_us"] - 0.1
        assert arm["exposed_us"] == arm["network_us"], "the host runs one launch after the other"
    layout = deal(cell["decode_tokens"], 256, slow.plans[0].schedule.groups)
    assert layout is not None
    expected, *others = (program.binding.results(program.plan) for program in programs.made)
    for found in others:
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b[layout.place])


def test_the_energy_of_links_costs_time_at_the_power_cap() -> None:
    bench, _ = rank()
    sent = 2 * 2048 * 16 * 4 * 2 / 2  # two all-reduces, each of two passes over half of it
    assert POWER is not None
    idle = {"layer_us": 1000.0, "layer_mj": 1e3 * 1e-3 * POWER.static_w}
    at_cap = {"layer_us": 800.0, "layer_mj": 0.8 * POWER.cap_w}
    graph = bench.graph
    for plan in (sequential(graph, 2048), overlap_network(graph, 2048, 8, 12)):
        gains = bench.gains_with_links({"sequential": idle, "measured": at_cap}, sequential(graph, 2048), plan)
        for gain, pj in zip(gains, (210, 430), strict=True):
            slower_s = 1e-12 * pj * sent / (POWER.cap_w - POWER.static_w)
            assert gain == pytest.approx(1e-3 / (0.8e-3 + slower_s), abs=1e-4), "sequential has power to spare"


def test_every_form_of_an_all_reduce_is_asked_for_by_its_collectives() -> None:
    bench, _ = rank()
    names = [op.name for op in bench.graph.operations if op.kernel == "all_reduce"]
    whole = 2048 * 16 * 4
    for form in (AllReduceForm.SPLIT, AllReduceForm.NORMED):
        forms = dict.fromkeys(names, form)
        plan = replace(overlap_network(in_forms(bench.graph, forms, 2), 2048, 8, 12), all_reduces=forms)
        asked = list(bench._collectives(plan))
        assert {name for name, _, _ in asked} == {"reduce_scatter", "all_gather"}
        assert sum(size for _, size, _ in asked) == 4 * whole
        assert {sms for _, _, sms in asked} == {8}


def test_plans_of_the_search_are_taken_for_their_sizes() -> None:
    bench, _ = rank()
    model = build(config("llama"), 2)
    graph = model.layer
    header = Header(
        model_fingerprint=fingerprint(graph), precision=FLOAT32, device="cpu", device_sms=12, tensor_parallel=2,
        dense_batch_tokens=512,
    )  # fmt: skip
    plans = sequential(graph, 256), overlap_network(graph, 512, 8, 12), overlap_network(graph, 1024, 4, 12)
    file = ScheduleFile(header=header, plans=plans)
    bench.check({"plan.json": file})
    assert bench.overlapped_plan(512, {"plan.json": file}) == ("plan.json:1", plans[1])
    with pytest.raises(ValueError, match=r"plan.json: no plan of several lanes for batches of 256 tokens"):
        bench.overlapped_plan(256, {"plan.json": file})
    with pytest.raises(ValueError, match=r"plan.json:2: launch \d+ \(.*_reduce.*\) has 4 SMs, expected 8 or more"):
        bench.overlapped_plan(1024, {"plan.json": file})
    with pytest.raises(ValueError, match="tensor_parallel is 4 in the file and 2 here"):
        bench.check({"plan.json": replace(file, header=replace(header, tensor_parallel=4))})


def test_what_nothing_else_ran_beside_is_exposed() -> None:
    graph = build(config("llama"), 2).layer
    plan = bound(overlap_network(graph, 256, 4, 12), graph)
    names = [plan.schedule.launches[number].operation for _, number in plan.steps]
    places = {kind: [k for k, name in enumerate(names) if ("reduce" in name) == kind] for kind in (True, False)}
    network, others = places[True], places[False]
    times = [
        LaunchTime(network[0], 1.0, 2.0),  # beside one until 1.5, and beside another from 1.75
        LaunchTime(others[0], 0.5, 1.5),
        LaunchTime(others[1], 1.25, 1.5),  # in the first one's time
        LaunchTime(others[2], 1.75, 3.0),
        LaunchTime(network[1], 3.0, 4.0),  # alone
        LaunchTime(network[2], 5.0, 6.0),  # beside one all the time
        LaunchTime(others[3], 4.5, 6.5),
    ]
    random.Random(0).shuffle(times)
    found = Exposure.of(times, plan)
    assert found == pytest.approx((3e6 / 3, 1.25e6 / 3))


class Machine:
    """Times a plan by its launches, and half of what its network takes; says on which network what was timed."""

    def __init__(self) -> None:
        self.timed: list[tuple[str, Schedule]] = []

    def here(self, shape: object, mix: Mix, *, network: NetworkTable, **options: Any) -> Any:
        def on(table: NetworkTable) -> Callable[[Schedule], Timing]:
            def timer(plan: Schedule) -> Timing:
                self.timed.append((table.header.name, plan))
                us = 1000.0 * len(plan.launches) + table.time("all_reduce", 2**26).us / len(plan.lanes)
                return Timing(us, 1500.0, 600.0, 600e-6 * us)

            timer.on = on  # type: ignore[attr-defined]
            timer.watch = lambda plan, watcher, runs: SHARD_PLAN  # type: ignore[attr-defined]
            return timer

        return on(network)


def test_the_command_labels_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    machine = Machine()
    monkeypatch.setattr(PlanTimer, "here", machine.here)
    monkeypatch.setattr(emulated_tp, "RecordedLaunches", lambda cuda_graphs: ClockedLaunches())
    monkeypatch.setattr(emulated_tp, "find_device", lambda wanted: H200)
    app = typer.Typer()
    app.command()(emulated_tp.main)
    output = tmp_path / "emulated.json"
    words = ["--output", str(output), "--rounds", "2"]
    app(words, standalone_mode=False)
    found = json.loads(output.read_text())
    about = found["emulated"]
    assert (about["ranks"], about["network"], about["link_pj_per_byte"]) == (8, "NCCL", [210, 430])
    assert about["rank_skew"] == [0.01, 0.03]
    assert [cell["tokens"] for cell in found["cells"]] == [2048, 4096]
    for cell, nccl_us in zip(found["cells"], (420, 734), strict=True):
        assert list(cell["arms"]) == [
            "nano-batch only", "overlapped, 150 GB/s", "overlapped, 250 GB/s", "overlapped, 350 GB/s"
        ]  # fmt: skip
        assert cell["sequential"]["asked_us"] == nccl_us
        rates = [cell["arms"][f"overlapped, {rate} GB/s"]["over_sequential"][0] for rate in (150, 250, 350)]
        assert rates == sorted(rates)
        for arm in cell["arms"].values():
            assert len(arm["over_sequential"]) == 3, "with its 95 % interval"
            assert len(arm["over_sequential_with_links"]) == 2
    names = [name for name, _ in machine.timed[:5]]
    assert machine.timed[:10] == [*machine.timed[:5], *reversed(machine.timed[:5])], "in turns"
    assert names == ["NCCL", "NCCL", *(f"assumed: {rate} GB/s on 8 SMs" for rate in (150, 250, 350))]
    lines = capsys.readouterr().out.splitlines()
    assert all("EMULATED" in line for line in lines)
    timed = len(machine.timed)
    app(words, standalone_mode=False)
    assert len(machine.timed) == timed, "what is known is not timed again"
    with pytest.raises(ValueError, match=r"another run: rates_gb_per_s is \[150.0, 250.0, 350.0\] there and \[90.0\]"):
        app([*words, "--rate", "90"], standalone_mode=False)


def test_a_size_that_is_no_multiple_of_tiles_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_tp, "find_device", lambda wanted: H200)
    app = typer.Typer()
    app.command()(emulated_tp.main)
    with pytest.raises(ValueError, match="expected a multiple of 128 from 256 on, got 1000"):
        app(["--output", str(tmp_path / "r"), "--tokens", "1000"], standalone_mode=False)
