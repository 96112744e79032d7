"""Whole runs by a profile: steps against the prediction of their own batch, runs against what their steps take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from nanoflow_search.__main__ import app
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import Mix
from nanoflow_search.emit.run_prediction import StepTimes, fitted
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError
from nanoflow_search.profile.points import partition_loads
from support.places import LLAMA_3_8B
from support.simulated.profiles import profiled
from typer.testing import CliRunner

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.config.quantization import AT_LOAD
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.cuda import bucket
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.presets import overlapped, sequential
from nanoflow_backend.scheduler.batch import Batch, Prefill

LLAMA = build(read_model_config(LLAMA_3_8B))


@pytest.fixture(scope="module")
def profile() -> Profile:
    device = SyntheticDevice(LLAMA.layer, DEVICES["H200-sustained"], noise=0.0)
    return profiled(device, LLAMA.layer, partition_loads(LLAMA.layer, 132, Mix(512, 512, 1024, 256), 1024))


def batch(decode_positions: list[int], chunks: list[tuple[int, int]]) -> Batch:
    """`chunks`: their first position and how many tokens; the last one ends its prompt."""
    prefills = [Prefill(n, start, [1] * tokens, n == len(chunks) - 1) for n, (start, tokens) in enumerate(chunks)]
    return Batch(1, list(range(len(decode_positions))), decode_positions, prefills, [], [])


def test_a_step_takes_what_is_predicted_of_its_batch(profile: Profile) -> None:
    times = StepTimes(LLAMA, profile, [sequential(LLAMA.layer, 1024)], 1024, bucket)
    found_s = times(batch([99, 300], [(0, 100), (50, 310)]))
    # 412 tokens are padded to 416; the prompts' tokens see 1 .. 100 and 51 .. 360 keys.
    mix = Mix(2, 414, (100 + 301) / 2, (100 * 50.5 + 310 * 205.5) / 410)
    layer = predict(sequential(LLAMA.layer, 416), TimingModel(profile, mix), 32)
    head_us = profile.surface("gate_up", layer.clock_mhz).duration_us(3) * 128256 / 28672
    assert found_s == pytest.approx(1e-6 * (32 * layer.layer_us + head_us))
    assert times.under_s == [found_s]
    assert times(batch([], [(0, 416)])) != found_s


def test_in_fp8_the_lm_head_stays_a_product_of_16_bits() -> None:
    config = replace(read_model_config(LLAMA_3_8B), quantization=AT_LOAD)
    model = build(config)
    device = SyntheticDevice(model.layer, DEVICES["H200-sustained"], noise=0.0)
    taken = profiled(device, model.layer, partition_loads(model.layer, 132, Mix(512, 512, 1024, 256), 1024))
    times = StepTimes(model, taken, [sequential(model.layer, 1024)], 1024, bucket)
    rows, step_us = 257, 1e6 * times(batch([500] * 256, [(0, 256)]))
    layer = predict(sequential(model.layer, 512), TimingModel(taken, Mix(256, 256, 501, 128.5)), 32)
    head_us = taken.surface("gate_up", layer.clock_mhz).duration_us(rows) * 128256 / 28672 * 1261 / 667
    assert step_us == pytest.approx(32 * layer.layer_us + head_us)


def test_a_profile_of_another_precision_predicts_nothing(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    words = ("--workload", "256/8", "--requests", "6", "--set", "kv_cache_dtype=fp8_e4m3")
    with pytest.raises(ProfileError, match=r"the profile was taken of layer .* in bfloat16 on .*kv float8_e4m3fn"):
        run(tmp_path / "r.json", path, *words)


def test_a_batch_runs_under_the_first_plan_that_holds_it(profile: Profile) -> None:
    halves = replace(overlapped(LLAMA.layer, 1024, 512, 0.5, 32, 132), least_decode_kv_tokens=300_000)
    plans = [sequential(LLAMA.layer, 256), halves, sequential(LLAMA.layer, 1024)]
    times = StepTimes(LLAMA, profile, plans, 1024, bucket)
    steps = [batch([800] * 256, []), batch([999] * 300, [(0, 500)]), batch([999] * 299, [(0, 500)])]
    took_s = [times(step) for step in steps]
    assert times.under_s == took_s
    shrunk = fitted(halves, 832)
    assert [group.stop for group in shrunk.groups] == [416, 832]
    mix = Mix(300, 532, 1000, 250.5)
    assert took_s[1] == pytest.approx(32e-6 * predict(shrunk, TimingModel(profile, mix), 32).layer_us, rel=0.02)


def run(output: Path, profile: Path, *words: str) -> dict[str, Any]:
    """Run the command, and return its result."""
    settings = ["--set", "kv_cache_tokens=100000"]
    command = [
        "predict-run",
        "--model",
        str(LLAMA_3_8B),
        "--profile",
        str(profile),
        "--out",
        str(output),
        *settings,
        *words,
    ]
    CliRunner().invoke(app, command, catch_exceptions=False)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_a_run_is_its_steps(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    words = ("--workload", "256/8", "--requests", "6", "--set", "dense_batch_tokens=512")
    alone = run(tmp_path / "alone.json", path, *words)
    # Two prompts a step but for the decodes' places; the last one decodes seven times after its prompt.
    assert alone["steps"] == 4 + 7
    assert alone["requests"] == 6
    (under,) = alone["under"]
    assert alone["wall_s"] == round(under["seconds"], 3)
    assert alone["total_tokens_per_s"] == pytest.approx(6 * 264 / under["seconds"], rel=1e-5)

    paced = run(tmp_path / "paced.json", path, *words, "--set", "prompt_tokens=256")
    assert paced["steps"] == 6 + 7
    header = Header(
        model_fingerprint=fingerprint(LLAMA.layer),
        precision=BFLOAT16,
        device=profile.header.device,
        device_sms=132,
        tensor_parallel=1,
        dense_batch_tokens=256,
    )
    file = tmp_path / "plan.json"
    ScheduleFile(header=header, plans=(sequential(LLAMA.layer, 128), sequential(LLAMA.layer, 256))).save(file)
    of_file = run(tmp_path / "file.json", path, *words[:4], "--set", f"schedule={file}")
    assert [plan["tokens"] for plan in of_file["under"]] == [128, 256]
    assert round(sum(plan["seconds"] for plan in of_file["under"]), 3) == of_file["wall_s"]
    assert of_file["settings"] == {"kv_cache_tokens": "100000", "schedule": "plan.json"}


def test_steps_under_plans_of_their_own_are_at_most_as_long(profile: Profile) -> None:
    plans = [sequential(LLAMA.layer, 1024)]
    alone, best = (StepTimes(LLAMA, profile, plans, 1024, bucket, best) for best in (False, True))
    few, read = batch([200] * 100, []), batch([1800] * 512, [(0, 512)])  # the second has much to hide
    assert best(few) == alone(few), "too small to be cut"
    mix = Mix(512, 512, 1801, 256.5)
    halves = overlapped(LLAMA.layer, 1024, 512, 0.5, 36, 132)
    shorter_us = predict(halves, TimingModel(profile, mix), 32).layer_us
    assert shorter_us < predict(plans[0], TimingModel(profile, mix), 32).layer_us
    assert best(read) <= alone(read) - 31e-6 * (predict(plans[0], TimingModel(profile, mix), 32).layer_us - shorter_us)


def test_the_size_of_the_kv_cache_is_asked_for(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    with pytest.raises(ValueError, match="--set kv_cache_tokens=N: expected how many tokens the KV cache holds"):
        CliRunner().invoke(
            app, ["predict-run", "--model", str(LLAMA_3_8B), "--profile", str(path)], catch_exceptions=False
        )
