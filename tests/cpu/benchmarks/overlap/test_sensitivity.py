"""The plans of benchmarks/overlap/sensitivity.py by brute force, and its two phases, on a device that is made up."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from nanoflow_search.cost.workload import Mix
from nanoflow_search.emit.statistics import STUDENT, Round
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.predict.predict import Timing, predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError
from support.simulated.overlap_machine import CPU, H200, MODEL, SHARES, Machine, map_of

from benchmarks.overlap import sensitivity, steady_batches
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import overlapped, sequential
from nanoflow_backend.schedule.validate import validate

KV_BYTES = 32 * 2048 * 2  # of a token


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
    measured = TimingModel(profile, Mix(decodes, tokens - decodes, cell["decode_context"], cell["prefill_context"]))
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
    output, words = tmp_path / "map.json", map_of((512, 768), (512, 2048))
    machine.here_is = CPU
    planned = run("sensitivity", output, *words)
    assert not machine.timed
    assert "margin_95" not in planned
    assert not any("over_sequential" in cell for cell in planned["cells"])

    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("planned again")

    machine.here_is = H200
    with monkeypatch.context() as patched:
        patched.setattr(steady_batches, "best_by_grid", nothing)
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
    found = run("sensitivity", tmp_path / "map.json", *map_of((512, 4096), (512, 8192)))
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
    found = run("sensitivity", tmp_path / "map.json", "--tokens", "512", "--tokens", "1024", "--context", "1024")
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

    def noise() -> float:
        return rng.lognormvariate(0, 0.01)

    for _ in range(400):
        noisy = [
            {"pairs": steady_batches.pairs(Round(*(Timing(100 * noise(), 1, 1, 1) for _ in range(4))))}
            for _ in range(6)
        ]
        gain = math.sqrt(math.prod(noisy[0]["pairs"]))  # of plans that are alike
        inside += abs(math.log(gain)) <= sensitivity.margin(noisy)
    assert 0.92 < inside / 400 < 0.98
    assert STUDENT[5] == pytest.approx(2.4469)
