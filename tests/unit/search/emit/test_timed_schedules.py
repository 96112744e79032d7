"""`nanoflow-search time` on the synthetic device: what is timed, what is predicted, and what is not timed again."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from msgspec.structs import replace
from nanoflow_search.__main__ import app
from nanoflow_search.emit.timed_schedules import compare, named_schedules
from nanoflow_search.hardware.machine import SyntheticMachine
from nanoflow_search.predict.predict import Timing
from nanoflow_search.profile.points import partition_loads
from nanoflow_search.request import SearchRequest
from support.places import LLAMA_3_8B
from support.simulated.profiles import profiled
from typer.testing import CliRunner

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential

REQUEST = SearchRequest.of(LLAMA_3_8B, 1, ("512/1024",))
LAYER, TOKENS = REQUEST.model.layer, 1024
PLAN = replace(overlapped(LAYER, TOKENS, TOKENS // 2, 0.5, 32, 132, granularity=128), least_decode_kv_tokens=9)


def run(*words: str) -> Result:
    command = ["time", "--model", str(LLAMA_3_8B), *words]
    return CliRunner().invoke(app, [*command, "--tokens", str(TOKENS), "--device", "synthetic", "--rounds", "2"])


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    header = Header(
        model_fingerprint=fingerprint(LAYER),
        precision=BFLOAT16,
        device="d",
        device_sms=132,
        tensor_parallel=1,
        dense_batch_tokens=TOKENS,
    )
    path = tmp_path / "plans.json"
    ScheduleFile(header=header, plans=(sequential(LAYER, 256), PLAN, sequential(LAYER, TOKENS))).save(path)
    return path


def test_schedules_are_timed_beside_sequential_and_predicted_before(plans: Path, tmp_path: Path) -> None:
    machine = SyntheticMachine()
    mix = REQUEST.mix("512/1024", TOKENS, machine.name)
    device = machine.load_runner(REQUEST, mix)
    profiled(device, LAYER, partition_loads(LAYER, 132, mix, TOKENS, sizes=(32,))).save(tmp_path / "profile.json")
    out = tmp_path / "timed.json"
    words = ("--schedule", str(plans), "--schedule", "nano-batched-2", "--profile", str(tmp_path / "profile.json"))
    done = run(*words, "--out", str(out), "--layers", "4")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(out.read_text())
    assert [cell["schedule"] for cell in found["cells"]] == ["plans.json:1", "nano-batched-2"]
    assert (found["model"], found["layers"], found["share"]) == ("llama-3-8b", 4, 1.0)
    timer = machine.timer(REQUEST, mix, num_layers=4)
    assert found["sequential"]["layer_us"] == round(timer(sequential(LAYER, TOKENS)).layer_us, 2)
    for cell, schedule in zip(found["cells"], (PLAN, nano_batched(LAYER, TOKENS, 2)), strict=True):
        measured_us = timer(schedule).layer_us
        assert cell["measured"]["layer_us"] == round(measured_us, 2)
        gain = found["sequential"]["layer_us"] / measured_us
        assert cell["over_sequential"] == pytest.approx([gain] * 3, abs=1e-3), "there is no noise"
        assert cell["error"] == pytest.approx(cell["predicted"]["layer_us"] / measured_us - 1, abs=1e-4)
        assert abs(cell["error"]) < 0.1
    written = out.read_bytes()
    again = run(*words, "--out", str(out), "--layers", "4")
    assert "all schedules are timed" in again.output
    assert out.read_bytes() == written
    other = run(*words, "--out", str(out), "--layers", "5")
    assert str(other.exception) == f"{out}: the result of another run: layers is 4 there and 5 here"


def test_plans_of_other_batches_and_presets_without_a_number_are_refused(plans: Path) -> None:
    assert list(named_schedules([str(plans)], REQUEST.model, TOKENS)) == ["plans.json:1"], "sequential is the base"
    with pytest.raises(ValueError, match=r"plans\.json: has plans for \[256, 1024, 1024\] tokens, none for 512"):
        named_schedules([str(plans)], REQUEST.model, 512)
    with pytest.raises(ValueError, match="expected a file, or nano-batched-N with a number N, got 'nano-batched-x'"):
        named_schedules(["nano-batched-x"], REQUEST.model, TOKENS)


def test_a_batch_of_an_engine_that_fills_up_reads_less(tmp_path: Path) -> None:
    read = []
    for share in ("0.25", "1.0"):
        out = tmp_path / f"{share}.json"
        assert run("--schedule", "nano-batched-2", "--share", share, "--out", str(out)).exit_code == 0
        read.append(json.loads(out.read_text())["decode_kv_tokens"])
    assert 0 < read[0] < read[1] / 4


def test_plans_share_the_runs_of_sequential() -> None:
    """A B C C B A: three plans, six runs a round."""
    runs: list[str] = []

    def timer(schedule: Schedule) -> Timing:
        runs.append(schedule.launches[0].lane)
        return Timing(100.0 * len(schedule.launches), 1500.0, 600.0, 0.06)

    base, other = sequential(LAYER, TOKENS), nano_batched(LAYER, TOKENS, 2)
    found = compare(timer, base, {"one": other, "two": PLAN}, 2)
    assert len(runs) == 2 * 6
    assert found["one"]["over_sequential"] == [round(len(base.launches) / len(other.launches), 4)] * 3
    assert found["one"]["measured"] == {
        "layer_us": 100.0 * len(other.launches), "sm_clock_mhz": 1500.0, "mean_power_w": 600.0, "layer_mj": 60.0
    }  # fmt: skip
