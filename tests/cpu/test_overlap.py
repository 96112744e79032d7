"""benchmarks/overlap.py: its arms, its plans by brute force, and runs that are cut, on a device that is made up."""

import json
import math
import random
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import checkpoints
import msgspec
import pytest
import torch
from msgspec.structs import replace
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.work import Mix
from nanoflow_search.emit.trials import STUDENT, Round
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import Timing, predict
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Profile, ProfileError
from overlap_machine import CPU, H200, LAYER, MIX, MODEL, SHARES, Machine, command, profile_of
from schedules import save
from shapes import config
from simulated_programs import Programs

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Group, Schedule
from nanoflow_backend.schedule.presets import overlapped, sequential
from nanoflow_backend.schedule.validate import validate

ROOT = Path(__file__).parents[2]
KV_BYTES = 32 * 2048 * 2  # of a token
sys.path.append(str(ROOT / "benchmarks"))

import halves  # noqa: E402
import overlap  # noqa: E402


@pytest.fixture(scope="module")
def graph() -> Graph:
    return LAYER


@pytest.fixture(scope="module")
def profile(graph: Graph) -> Profile:
    return profile_of(graph, MIX)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profile: Profile) -> Callable[..., dict[str, Any]]:
    return command(monkeypatch, tmp_path, profile)


def test_cut_alone_is_the_same_launches_in_one_lane(graph: Graph, profile: Profile) -> None:
    both = halves.overlap_memory(graph, Measured(profile, Mix(680, 1368, 1280, 512)), 3)
    alone = halves.nano_batch_only(graph, both)
    for plan in (both, alone):
        validate(plan, graph, 32, 132)
    assert both.lanes == ("compute", "memory")
    assert alone.lanes == ("compute",)
    assert not alone.partition
    assert [(x.nano, x.layers_ahead) for x in alone.launches] == [(x.nano, x.layers_ahead) for x in both.launches]
    assert {x.waits for x in alone.launches} == {()}
    assert alone.groups == both.groups
    assert [(group.stop, group.decodes) for group in both.groups] == [(1024, 0.5), (2048, 0.5)]


@pytest.mark.parametrize("overlaps", [True, False])
def test_arms_change_no_token(overlaps: bool, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.make("llama"), tmp_path)
    model = read_model_config(tmp_path)
    layer, rng = build(model).layer, random.Random(5)
    prompts = [[rng.randrange(model.vocab_size) for _ in range(rng.randint(1, 70))] for _ in range(40)]
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    mix = Mix(40, 88, 40, 30)
    arm = halves.overlap_memory(layer, Measured(profile_of(layer, mix), mix), 2)
    plan = save(tmp_path / "plan.json", layer, arm if overlaps else halves.nano_batch_only(layer, arm))
    expected, found = (
        [
            completion.token_ids
            for completion in LLM.from_pretrained(tmp_path, dense_batch_tokens=128, page_tokens=4, **options).generate(
                prompts, greedy
            )
        ]
        for options in ({}, {"schedule": plan})
    )
    assert found == expected


def test_halves_are_on_the_partition_that_is_predicted_best(graph: Graph, profile: Profile) -> None:
    """And nearly the best that the device times, by the law that the profile is of."""
    rng, device = random.Random(1), SyntheticDevice(graph, DEVICES["H200-sustained"], noise=0.0)
    chosen = set()
    for _ in range(12):
        tokens = 128 * rng.randint(2, 16)
        decodes = round(tokens * rng.uniform(0.05, 0.6))
        mix = Mix(decodes, tokens - decodes, rng.uniform(200, 3000), rng.uniform(50, 1500))
        measured = Measured(profile, mix)
        found = halves.overlap_memory(graph, measured, 3)
        plans = [overlapped(graph, tokens, tokens // 2, 0.5, sms, 132, 64) for sms in SHARES]
        assert found == plans[min(range(3), key=lambda n: predict(plans[n], measured, 3).layer_us)]
        timed = [device.time_plan(plan, mix, 3).layer_us for plan in plans]
        assert timed[plans.index(found)] <= 1.08 * min(timed), (mix, timed)
        chosen.add(found.partition["memory"])
    assert len(chosen) > 1


@pytest.mark.parametrize(("context", "tokens"), [(512, 512), (2048, 1024), (8192, 768)])
def test_the_plan_of_a_cell_is_the_best_of_all(
    machine: Machine,
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    graph: Graph,
    profile: Profile,
    context: int,
    tokens: int,
) -> None:
    machine.here_is = CPU
    words = ("--tokens", str(tokens), "--context", str(context))
    (cell,) = run("sensitivity", tmp_path / "map.json", *words)["cells"]
    decodes = cell["decode_tokens"]
    measured = Measured(profile, Mix(decodes, tokens - decodes, cell["decode_context"], cell["prefill_context"]))
    brute = {
        (sms, stop, share): predict(overlapped(graph, tokens, stop, share, sms, 132, 128), measured, 3).layer_us
        for sms in SHARES
        for stop in range(128, tokens, 128)
        if tokens <= 4 * stop <= 3 * tokens
        for more in (-0.2, -0.1, 0.0, 0.1, 0.2)
        for share in [round(min(max(stop / tokens + more, 0), 1), 2)]
    }
    half = cell["first_half"]
    least_us = brute[cell["attention_sms"], half["tokens"], half["decodes"]]
    assert least_us == min(brute.values())
    assert cell["predicted"]["plan_us"] == pytest.approx(least_us, abs=0.005)
    sequential_us = predict(sequential(graph, tokens), measured, 3).layer_us
    assert cell["predicted"]["sequential_us"] == pytest.approx(sequential_us, abs=0.005)
    assert cell["predicted"]["gain"] == pytest.approx(sequential_us / least_us, abs=5e-5)
    plan = msgspec.convert(cell["plan"], Schedule)
    assert plan == overlapped(graph, tokens, half["tokens"], half["decodes"], cell["attention_sms"], 132, 128)
    validate(plan, graph, 32, 132)


def test_all_is_predicted_before_anything_is_timed_and_a_part_may_be(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, words = tmp_path / "map.json", ("--tokens", "512", "768", "--context", "512", "2048")
    machine.here_is = CPU
    planned = run("sensitivity", output, *words)
    assert not machine.timed
    assert "margin_95" not in planned
    assert not any("over_sequential" in cell for cell in planned["cells"])

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("planned again")

    machine.here_is = H200
    with monkeypatch.context() as patched:
        patched.setattr(overlap, "best_by_grid", nothing)
        part = run("sensitivity", output, "--tokens", "768", "--context", "512")
        plan = msgspec.convert(part["cells"][1]["plan"], Schedule)
        assert [cell["tokens"] for cell in part["cells"]] == [512, 768, 512, 768]
        assert part["cells"][0::2] + part["cells"][3:] == planned["cells"][0::2] + planned["cells"][3:]
        assert part["cells"][1].items() >= planned["cells"][1].items()
        assert machine.timed[1:3] == [plan, plan]
        whole = run("sensitivity", output, *words)
        assert whole["cells"][1] == part["cells"][1]
    assert len(machine.timed) == 4 * 4
    for before, cell in zip(planned["cells"], whole["cells"], strict=True):
        assert cell.items() >= before.items()
        error = cell["predicted"]["plan_us"] / cell["overlapped"]["layer_us"] - 1
        assert cell["error"] == pytest.approx(error, abs=1e-4)
        assert abs(cell["error"]) < 0.08

    fresh, seen = tmp_path / "fresh.json", []
    timer = machine.here

    def looking(config: ModelConfig, mix: Mix, **options: Any) -> Callable[[Schedule], Timing]:
        seen.append([set(cell) for cell in json.loads(fresh.read_text())["cells"]])
        return timer(config, mix, **options)

    monkeypatch.setattr(PlanTimer, "here", looking)
    run("sensitivity", fresh, *words)
    assert [len(cells) for cells in seen] == [4] * 4
    assert all({"plan", "predicted"} <= cell for cells in seen for cell in cells)
    assert not any("over_sequential" in cell for cell in seen[0])


@pytest.mark.parametrize("benchmark_", ["ablation", "sensitivity"])
def test_profiles_of_something_else_are_refused(
    machine: Machine,
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    graph: Graph,
    profile: Profile,
    benchmark_: str,
) -> None:
    output, path = tmp_path / "found.json", tmp_path / "profile.json"
    machine.here_is = Device("cuda", "NVIDIA A100", 108)
    both = r"profile.json: the profile is of a NVIDIA H200 \(132 SMs\), and the GPU here is a NVIDIA A100 \(108 SMs\)"
    with pytest.raises(ProfileError, match=both):
        run(benchmark_, output)
    machine.here_is = H200
    replace(profile, header=replace(profile.header, model_fingerprint="0" * 16)).save(path)
    with pytest.raises(ProfileError, match=r"profile.json: the profile is of another model"):
        run(benchmark_, output)
    replace(profile, points=tuple(point for point in profile.points if point.sms == 132)).save(path)
    with pytest.raises(ProfileError, match="attention and products were not measured on SMs of their own"):
        run(benchmark_, output)
    assert not output.exists()
    assert not machine.timed


def test_a_file_of_another_profile_is_left_alone(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path, profile: Profile
) -> None:
    machine.here_is, output, words = CPU, tmp_path / "map.json", ("--tokens", "512", "--context", "512")
    run("sensitivity", output, *words)
    before = output.read_bytes()
    path = tmp_path / "profile.json"
    one = Profile.load(path)
    replace(profile, pairs=profile.pairs[1:]).save(path)
    with pytest.raises(ValueError, match=f"profile is '{one.hash()}' there and '{Profile.load(path).hash()}' here"):
        run("sensitivity", output, *words)
    assert output.read_bytes() == before


def test_no_more_tokens_decode_than_memory_holds(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = run("sensitivity", tmp_path / "map.json", "--tokens", "512", "4096", "--context", "512", "8192")
    assert [(cell["context"], cell["tokens"]) for cell in found["cells"]] == [
        (512, 512), (512, 4096), (8192, 512), (8192, 4096)
    ]  # fmt: skip
    free = 141e9 - 2 * 8.03e9
    for cell, mix in zip(found["cells"], machine.mixes, strict=True):
        assert round(mix.tokens) == cell["tokens"]
        assert mix.decode_context == pytest.approx(cell["context"])
        third = cell["tokens"] / 3
        room = free / KV_BYTES / cell["context"]
        assert cell["decode_tokens"] == pytest.approx(min(third, room), abs=1)
        assert cell["memory_full"] == (third > room)
    assert [cell["memory_full"] for cell in found["cells"]] == [False, False, True, True]


def test_a_cell_is_one_round_and_its_margin_is_pooled(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    found = run("sensitivity", tmp_path / "map.json", "--tokens", "512", "1024", "--context", "1024")
    one, other = machine.timed[:4], machine.timed[4:]
    for a, b, c, d in (one, other):
        assert a == d == sequential(build(read_model_config(MODEL)).layer, a.tokens)
        assert b == c != a
    logs = [[math.log(gain) for gain in cell["pairs"]] for cell in found["cells"]]
    for cell, both in zip(found["cells"], logs, strict=True):
        assert cell["over_sequential"] == pytest.approx(math.exp(mean(both)), rel=1e-3)
        assert cell["over_sequential"] == pytest.approx(
            cell["sequential"]["layer_us"] / cell["overlapped"]["layer_us"], rel=1e-3
        )
        assert len(set(both)) == 2
    # The mean of two has half of the variance of one; each cell has one degree of freedom.
    variance = mean((a - b) ** 2 / 2 for a, b in logs)
    assert found["margin_95"] == pytest.approx(4.3027 * math.sqrt(variance / 2), rel=0.05)


def test_the_margin_holds_19_times_of_20() -> None:
    rng, inside = random.Random(2), 0
    for _ in range(400):
        noisy = [
            {"pairs": overlap.pairs(Round(*(Timing(100 * rng.lognormvariate(0, 0.01), 1, 1, 1) for _ in range(4))))}
            for _ in range(6)
        ]
        gain = math.sqrt(math.prod(noisy[0]["pairs"]))  # of plans that are alike
        inside += abs(math.log(gain)) <= overlap.margin(noisy)
    assert 0.92 < inside / 400 < 0.98
    assert STUDENT[5] == pytest.approx(2.4469)


def test_arms_on_programs_that_compute() -> None:
    made: list[Programs] = []
    timers: list[weakref.ref[PlanTimer]] = []
    shape = config("llama", num_layers=2, dtype="float32")

    def timer_of(mix: Mix) -> PlanTimer:
        assert [timer() for timer in timers] == [None] * len(timers), "what was timed before has left the memory"
        programs = Programs(layers=2)
        timer = PlanTimer(
            shape, mix, programs.gpu, programs, programs.burst, page_tokens=16, seconds=0.1, warm_s=0.05,
            num_layers=2, device="cpu", sleep=programs.gpu.sleep,
        )  # fmt: skip
        timers.append(weakref.ref(timer))
        made.append(programs)
        return timer

    bench = overlap.Bench(shape, profile_of(build(shape).layer, Mix(128, 256, 70, 30)), 2, timer_of)
    for workload, tokens in (("60/20", 256), ("30/2", 384)):
        cell = bench.ablate(workload, tokens, {}, 2, None)
        programs = made[-1].made
        assert len(programs) == 3, "each plan is built once"
        for arm in cell["arms"].values():
            assert arm["over_sequential"][0] == pytest.approx(0.5, rel=0.02), "twice as many launches"
        layout = deal(cell["decode_tokens"], tokens, (Group(tokens // 2, 0.5), Group(tokens, 0.5)))
        assert layout is not None
        expected, *others = (program.binding.results(program.plan) for program in programs)
        for found in others:
            for a, b in zip(expected, found, strict=True):
                torch.testing.assert_close(a, b[layout.place])
        del programs, expected, others, found, a, b


def test_a_run_that_was_cut_goes_on(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ablation.json"
    first = run("ablation", output, "--batch", "512/2:1024")
    assert len(machine.timed) == 3 * 6
    a, b, c = machine.timed[:3]
    assert machine.timed == 3 * [a, b, c, c, b, a]
    both = run("ablation", output, "--batch", "512/2:1024", "--batch", "1024/512:2048")
    assert both["cells"][0] == first["cells"][0]
    assert [(cell["workload"], cell["tokens"]) for cell in both["cells"]] == [("512/2", 1024), ("1024/512", 2048)]
    assert len(machine.timed) == 6 * 6
    assert "[1/2] workload 512/2, tokens 1024: known" in capsys.readouterr().out
    for cell in both["cells"]:
        assert list(cell["arms"]) == ["nano-batch only", "overlap memory"]
        assert cell["untimed"] == {"searched": "no schedule file for this workload"}
        for arm in cell["arms"].values():
            gain, low, high = arm["over_sequential"]
            assert low <= gain <= high
            assert gain == pytest.approx(arm["sequential"]["layer_us"] / arm["measured"]["layer_us"], rel=1e-3)

    plan = ROOT / "benchmarks" / "schedules" / "llama3_8b_h200_1024_512.json"
    searched = run("ablation", output, "--batch", "512/2:1024", "--batch", "1024/512:2048", "--schedule", str(plan))
    assert len(machine.timed) == 6 * 6 + 3 * 4, "the one arm that was missing"
    assert searched["cells"][0] == first["cells"][0]
    last = searched["cells"][1]
    assert last["arms"].pop("searched")["schedule"] == f"{plan.name}:1"
    assert last["arms"] == both["cells"][1]["arms"]
    assert last["untimed"] == {}


def test_why_nothing_searched_is_timed(machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    searched = ScheduleFile.load(ROOT / "benchmarks" / "schedules" / "llama3_8b_h200_1024_512.json")
    asks = replace(searched.plans[1], least_decode_kv_tokens=683 * 1280 + 1)  # one more than the batch reads
    plan = tmp_path / "plan.json"
    replace(searched, plans=(searched.plans[0], asks, searched.plans[2])).save(plan)
    batches = ("--batch", "1024/512:1024", "--batch", "1024/512:1536", "--batch", "1024/512:2048")
    found = run("ablation", tmp_path / "ablation.json", *batches, "--schedule", str(plan), "--rounds", "2")
    assert [cell["untimed"]["searched"] for cell in found["cells"]] == [
        "plan.json: no plan for batches of 1024 tokens",
        "plan.json: sequential is its plan",
        "plan.json: sequential is its plan",
    ]


def test_the_file_of_another_run_is_left_alone(
    machine: Machine, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "ablation.json"
    run("ablation", output, "--batch", "512/2:512")
    before = output.read_bytes()
    with pytest.raises(ValueError, match=r"another run: benchmark is 'ablation' there and 'sensitivity' here; seconds"):
        run("sensitivity", output)
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1024/512", "batch: expected PROMPT/OUTPUT:TOKENS such as 512/2:2048, got '1024/512'"),
        ("1024:2048", "workload: expected PROMPT/OUTPUT"),
        ("512/2:1000", "expected a multiple of 128 from 256 on, got 1000"),
    ],
)
def test_bad_batches_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlap.parse_batch(text)
