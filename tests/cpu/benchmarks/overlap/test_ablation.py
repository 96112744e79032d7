"""The arms of benchmarks/overlap/ablation.py, and runs that are cut, on a device that is made up."""

import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.plan_timer import PlanTimer
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from support.models.shapes import config
from support.places import ROOT
from support.schedule.schedules import save
from support.simulated.overlap_machine import SHARES, Machine, profile_of
from support.simulated.programs import Programs

from benchmarks.models import checkpoints
from benchmarks.overlap import ablation, halves, steady_batches
from nanoflow_backend.config.precision import FLOAT32
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.layout import deal
from nanoflow_backend.schedule.plan import Group
from nanoflow_backend.schedule.presets import overlapped
from nanoflow_backend.schedule.validate import validate


def test_cut_alone_is_the_same_launches_in_one_lane(graph: Graph, profile: Profile) -> None:
    both = halves.overlap_memory(graph, TimingModel(profile, Mix(680, 1368, 1280, 512)), 3)
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
    built, rng = build(model), random.Random(5)
    layer = built.layer
    prompts = [[rng.randrange(model.vocab_size) for _ in range(rng.randint(1, 70))] for _ in range(40)]
    greedy = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    mix = Mix(40, 88, 40, 30)
    arm = halves.overlap_memory(layer, TimingModel(profile_of(layer, mix), mix), 2)
    plan = save(tmp_path / "plan.json", built, arm if overlaps else halves.nano_batch_only(layer, arm))
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
        measured = TimingModel(profile, mix)
        found = halves.overlap_memory(graph, measured, 3)
        plans = [overlapped(graph, tokens, tokens // 2, 0.5, sms, 132, 64) for sms in SHARES]
        assert found == plans[min(range(3), key=lambda n: predict(plans[n], measured, 3).layer_us)]
        timed = [device.time_plan(plan, mix, 3).layer_us for plan in plans]
        assert timed[plans.index(found)] <= 1.08 * min(timed), (mix, timed)
        chosen.add(found.partition["memory"])
    assert len(chosen) > 1


def test_arms_on_programs_that_compute() -> None:
    made: list[Programs] = []
    timers: list[weakref.ref[PlanTimer]] = []
    shape = config("llama", num_layers=2)

    def timer_of(mix: Mix) -> PlanTimer:
        assert [timer() for timer in timers] == [None] * len(timers), "what was timed before has left the memory"
        programs = Programs(layers=2)
        timer = PlanTimer(
            shape, mix, programs.gpu, programs, programs.burst, page_tokens=16, seconds=0.1, warm_s=0.05,
            num_layers=2, precision=FLOAT32, device="cpu", sleep=programs.gpu.sleep,
        )  # fmt: skip
        timers.append(weakref.ref(timer))
        made.append(programs)
        return timer

    bench = steady_batches.SteadyBatches(shape, profile_of(build(shape).layer, Mix(128, 256, 70, 30)), 2, timer_of)
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
        ablation.parse_batch(text)
