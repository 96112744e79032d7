"""The GPU as what runs loads, on a GPU in simulated time."""

from pathlib import Path

import pytest
from nanoflow_search.hardware.gpu import GpuLoadRunner, partition_of
from nanoflow_search.hardware.inputs import RotatingCalls
from nanoflow_search.profile.load import Load, SoloLoad
from nanoflow_search.profile.measure import profile_header, take_profile
from support.places import LLAMA_3_8B
from support.simulated.gpu import IDLE_W, SimulatedGpu, SimulatedWork

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.green_contexts import Shares

LAYER = build(read_model_config(LLAMA_3_8B)).layer


class Cases:
    """A stand-in for Operands: what a load takes, in seconds and watts."""

    graph: Graph = LAYER

    def __init__(self) -> None:
        self.asked: list[Load] = []
        self.streams: list[str | None] = []

    def calls(self, load: Load) -> RotatingCalls:
        self.asked.append(load)
        watts = 700.0 if load.operation == "gate_up" else 300.0
        return RotatingCalls(lambda _: (load.amount * 1e-6, watts), 1)


def device(gpu: SimulatedGpu, cases: Cases) -> GpuLoadRunner:
    def capture(calls: RotatingCalls, stream: str | None) -> SimulatedWork:
        cases.streams.append(stream)
        call_s, watts = calls.call(0)
        return SimulatedWork(gpu, call_s, watts, calls=max(1, round(0.03 / call_s)))

    nothing = RotatingCalls(lambda _: (1e-3, 60.0), 1)

    def split(shares: Shares) -> dict[str, str]:
        return {lane: f"{lane} of {shares}" for lane, _ in shares}

    return GpuLoadRunner("simulated", 132, cases, gpu, capture, split, nothing, sleep=gpu.sleep)


def test_power_is_that_of_the_load_alone() -> None:
    """Whatever the device does in the rest of the time."""
    gpu = SimulatedGpu()
    measured = device(gpu, Cases())
    assert measured.static_w == pytest.approx(IDLE_W + 60, rel=0.01)
    for busy, heated in ((1.0, False), (0.5, False), (0.5, True)):
        found = measured.time([Load("qkv", 1000)], busy, heated)
        assert found.durations_us == pytest.approx((1000,))
        assert found.power_w == pytest.approx(IDLE_W + 300, rel=0.03)
    beside = measured.time([Load("qkv", 1000), Load("attention/decode", 500)])
    assert beside.durations_us == pytest.approx((1000, 500))
    assert beside.power_w == pytest.approx(IDLE_W + 600, rel=0.01)


def test_a_collective_of_one_rank_takes_nothing() -> None:
    cases = Cases()
    found = device(SimulatedGpu(), cases).time([Load("mlp_reduce", 4096)])
    assert found.durations_us == (0.0,)
    assert not cases.asked


def test_a_profile_of_it(tmp_path: Path) -> None:
    """A second clock is sought by heat where the first is the highest, by pauses where it is not; the file goes on
    with the static power that it began with."""
    gpu, path = SimulatedGpu(), tmp_path / "profile.json"
    measured = device(gpu, Cases())
    alone = [SoloLoad(Load("qkv", 1000), two_clocks=True)]
    profile = take_profile(measured, profile_header(measured, LAYER), alone, [], path)
    assert [(p.busy, p.heated) for p in profile.points] == [(1.0, False), (0.5, False)]
    assert profile.points[0].dynamic_j == pytest.approx((300 - 60) * 1e-3, rel=0.02)
    again = device(gpu, Cases())
    again.__dict__["static_w"] = 150.0
    longer = take_profile(again, profile_header(again, LAYER), [*alone, SoloLoad(Load("o", 500))], [], path)
    assert longer.header == profile.header
    assert [p.operation for p in longer.points] == ["qkv", "qkv", "o"]


def test_loads_that_all_have_sms_run_on_those_alone() -> None:
    """On streams of one partition, whose shares are all of the device's SMs and whose largest is split off last."""
    gpu, cases = SimulatedGpu(), Cases()
    measured = device(gpu, cases)
    measured.time([Load("qkv", 1000, 92), Load("attention/decode", 500, 40)])
    shares = (("0", 40), ("1", 92))
    assert cases.streams == [f"1 of {shares}", f"0 of {shares}"]
    assert partition_of([Load("qkv", 1000, 92)], 132) == (shares, ["1"])  # the same partition
    assert partition_of([Load("attention/decode", 500, 40)], 132) == (shares, ["0"])
    assert partition_of([Load("qkv", 1, 66), Load("o", 1, 66)], 132) == ((("0", 66), ("1", 66)), ["0", "1"])
    assert partition_of([Load("qkv", 1000, 132)], 132) == ((("0", 132),), ["0"])
    for shared in ([Load("qkv", 1), Load("o", 1, 32)], [Load("qkv", 1, 100), Load("o", 1, 40)], [Load("qkv", 1)]):
        assert partition_of(shared, 132)[0] == ()
        measured.time(shared)
    assert cases.streams[2:] == [None] * 5
