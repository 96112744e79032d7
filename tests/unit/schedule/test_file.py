"""The schedule file, and how a configuration names a schedule."""

import json
import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from support.models.shapes import config
from support.schedule.schedules import random_schedule, rotated

from nanoflow_backend.config.engine_config import EngineConfig, SettledConfig
from nanoflow_backend.config.precision import BFLOAT16, FLOAT32
from nanoflow_backend.graph.collectives import AllReduceForm, in_forms
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.file import MOST_PLANS, Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.plan import ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential
from nanoflow_backend.schedule.source import find_schedules, named_dense_batch_tokens

MODEL = build(config("llama"), 2)
HEADER = Header(
    model_fingerprint=fingerprint(MODEL.layer),
    precision=FLOAT32,
    device="cpu",
    tensor_parallel=2,
    dense_batch_tokens=32,
)


def configured(schedule: str | Path, tokens: int = 64) -> SettledConfig:
    return unsettled(schedule, tokens).settle("cpu")


def unsettled(schedule: str | Path, tokens: int | None) -> EngineConfig:
    return EngineConfig(model="/model", schedule=str(schedule), tensor_parallel=2, dense_batch_tokens=tokens)


def saved(path: Path) -> Path:
    """Plans for 32, 64 and 128 tokens: whole, with shares and a layer ahead, and with an all-reduce in two."""
    layer = in_forms(MODEL.layer, {"mlp_reduce": AllReduceForm.SPLIT}, 2)
    overlapped = rotated(MODEL.layer, nano_batched(MODEL.layer, 64, 2), ("attention_norm", "qkv"), 32)
    overlapped = replace(overlapped, launches=tuple(replace(x, sms=40) for x in overlapped.launches))
    split = replace(nano_batched(layer, 128, 3, granularity=16), all_reduces={"mlp_reduce": AllReduceForm.SPLIT})
    plans = (sequential(MODEL.layer, 32), overlapped, split)
    header = replace(HEADER, dense_batch_tokens=96, solver="HiGHS", gap=0.01, predicted_us=1234.5)
    ScheduleFile(header=header, plans=plans).save(path)
    return path


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = saved(tmp_path / "plans.json")
    file = ScheduleFile.load(path)
    again = tmp_path / "again.json"
    file.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert ScheduleFile.load(again) == file
    for seed in range(20):
        plan = random_schedule(MODEL.layer, 32, random.Random(seed))
        plan = replace(plan, partition=dict.fromkeys(plan.lanes, 4))
        file = ScheduleFile(header=HEADER, plans=(plan, overlapped(MODEL.layer, 64, 16, 0.3, 40, 132)))
        file.save(again)
        assert ScheduleFile.load(again) == file


def test_plans_reach_as_far_as_batches(tmp_path: Path) -> None:
    path = saved(tmp_path / "plans.json")
    for tokens, expected in [(1, [32]), (32, [32]), (33, [32, 64]), (64, [32, 64]), (65, [32, 64, 128])]:
        assert [plan.tokens for plan in find_schedules(configured(path, tokens), MODEL)] == expected
    *of_the_file, beyond = find_schedules(configured(path, 200), MODEL)
    assert tuple(of_the_file) == ScheduleFile.load(path).plans
    assert beyond == sequential(MODEL.layer, 200)


def test_plans_of_one_size_come_by_what_they_ask_for(tmp_path: Path) -> None:
    sizes = [(32, 7), (32, 0), (64, 90), (64, 8), (64, 0), (128, 0)]
    plans = tuple(replace(sequential(MODEL.layer, n), least_decode_kv_tokens=least) for n, least in sizes)
    path = tmp_path / "plans.json"
    ScheduleFile(header=HEADER, plans=plans).save(path)
    assert ScheduleFile.load(path).plans == plans
    for tokens, expected in [(1, 2), (32, 2), (33, 5), (64, 5), (65, 6)]:
        assert find_schedules(configured(path, tokens), MODEL) == plans[:expected]
    for a, b in pairwise(range(len(plans))):
        swapped = [*plans[:a], plans[b], plans[a], *plans[b + 1 :]]
        with pytest.raises(ScheduleError, match="plans: expected at least one, by ascending tokens, and those of"):
            ScheduleFile(header=HEADER, plans=tuple(swapped))
    for absent in (1, 4):
        rest = plans[:absent] + plans[absent + 1 :]
        with pytest.raises(ScheduleError, match=f"the last one for {plans[absent].tokens} tokens must be for every"):
            ScheduleFile(header=HEADER, plans=rest)


def test_the_files_step_is_the_engines_where_the_user_names_none(tmp_path: Path) -> None:
    path = saved(tmp_path / "plans.json")
    assert named_dense_batch_tokens(unsettled(path, None)) == 96
    assert named_dense_batch_tokens(unsettled(path, 48)) == 48
    assert named_dense_batch_tokens(unsettled("sequential", None)) is None
    assert named_dense_batch_tokens(unsettled(tmp_path / "absent.json", 48)) == 48
    with pytest.raises(ScheduleError, match=r"absent\.json: No such file or directory"):
        named_dense_batch_tokens(unsettled(tmp_path / "absent.json", None))


def test_presets_are_found_by_name() -> None:
    assert find_schedules(configured("sequential"), MODEL) == (sequential(MODEL.layer, 64),)
    assert find_schedules(configured("nano-batched-3"), MODEL) == (nano_batched(MODEL.layer, 64, 3),)
    with pytest.raises(ScheduleError, match=r"schedule nano-batched-65: parts: expected 1\.\.64 nano-batches"):
        find_schedules(configured("nano-batched-65"), MODEL)
    with pytest.raises(ScheduleError, match="schedule fast: expected sequential, nano-batched-N, auto, or the path of"):
        find_schedules(configured("fast"), MODEL)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"absent\.json: No such file or directory"):
        find_schedules(configured(tmp_path / "absent.json"), MODEL)


def edited(tmp_path: Path, *place: Any, value: Any) -> Path:
    """The file with the entry at `place` replaced."""
    path = saved(tmp_path / "plans.json")
    content = json.loads(path.read_text())
    entry = content
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("header", "solvr"), 1, r"Object contains unknown field `solvr` - at `\$\.header`"),
        (("plans", 1, "launches", 0, "stream"), 1, r"unknown field `stream` - at `\$\.plans\[1\]\.launches\[0\]`"),
        (("plans", 0, "tokens"), "32", r"Expected `int`, got `str` - at `\$\.plans\[0\]\.tokens`"),
        (("plans", 0, "tokens"), 0, "tokens: expected an integer >= 1, got 0"),
        (("header", "format_version"), 1, "format version 1, this engine reads 3: search again"),
        (("header", "format_version"), None, r"Expected `int`, got `null` - at `\$\.header\.format_version`"),
        (("header",), {}, r"missing required field `format_version` - at `\$\.header`"),
        (
            ("header", "device"),
            "NVIDIA H200",
            "made for something else: device is 'NVIDIA H200' in the file and 'cpu' here",
        ),
        (("header", "precision", "kv"), "float16", "precision is .* kv float16 in the file and float32 here"),
        (("header", "precision"), msgspec.to_builtins(BFLOAT16), "precision is bfloat16 in the file and float32 here"),
        (("header", "precision"), {}, r"missing required field `weights` - at `\$\.header\.precision`"),
        (("header", "tensor_parallel"), 4, "tensor_parallel is 4 in the file and 2 here"),
        (("header", "model_fingerprint"), "0" * 16, "model_fingerprint is '0000000000000000' in the file and"),
        (("header", "dense_batch_tokens"), 129, r"dense_batch_tokens: expected 1\.\.128, which plans reach, got 129"),
        (("header", "tensor_parallel"), 0, r"Expected `int` >= 1 - at `\$\.header\.tensor_parallel`"),
        (("header", "device_sms"), -1, r"Expected `int` >= 1 - at `\$\.header\.device_sms`"),
        (("header", "dense_batch_tokens"), 2**31, r"Expected `int` <= 2147483647 - at `\$\.header\.dense"),
        (("header", "predicted_us"), -1.0, r"Expected `float` >= 0.0 - at `\$\.header\.predicted_us`"),
        (("header", "gap"), -0.1, r"Expected `float` >= 0.0 - at `\$\.header\.gap`"),
        (("plans",), [], "plans: expected at least one, by ascending tokens, and .* least_decode_kv_tokens; got none"),
        (("plans", 0, "tokens"), 128, r"different least_decode_kv_tokens; got 128 \(0\), 64 \(0\), 128 \(0\)"),
        (("plans", 0, "tokens"), 64, r"different least_decode_kv_tokens; got 64 \(0\), 64 \(0\), 128 \(0\)"),
        (
            ("plans", 1, "least_decode_kv_tokens"),
            5,
            "plans: the last one for 64 tokens must be for every batch, with least_decode_kv_tokens 0; it has 5",
        ),
        (("plans", 1, "least_decode_kv_tokens"), -1, "least_decode_kv_tokens: expected an integer >= 0, got -1"),
        (("plans", 1, "least_decode_kv_tokens"), 0.5, r"Expected `int`, got `float` - at `\$\.plans\[1\]\.least_de"),
        (("plans", 1, "launches", 3, "start"), 31, "rope_append: tokens 31..32 are covered twice"),
        (("plans", 1, "launches", 3, "operation"), "x", r"launch 3 \(x 32\.\.64\): the model has no such operation"),
        (("plans", 1, "all_reduces"), {"qkv": "split"}, "not an all-reduce: qkv"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, place: tuple[Any, ...], value: Any, message: str) -> None:
    path = edited(tmp_path, *place, value=value)
    with pytest.raises(ScheduleError, match=message) as error:
        find_schedules(configured(path, 64), MODEL)
    assert str(path) in str(error.value)


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    path.write_bytes(b'{"header": ')
    with pytest.raises(ScheduleError, match=r"plans\.json: Input data was truncated"):
        ScheduleFile.load(path)
    path.write_bytes(b'{"header": {"format_version": 3, "model_fingerprint": "\xff"}}')
    with pytest.raises(ScheduleError, match=r"plans\.json: 'utf-8' codec can't decode"):
        ScheduleFile.load(path)


def test_the_fingerprint_sees_operations_widths_and_shapes() -> None:
    fields: list[dict[str, Any]] = [{}, {"intermediate_size": 38}, {"num_kv_heads": 4}, {"qkv_bias": True}]
    prints = {fingerprint(build(config("llama", **changed)).layer) for changed in fields}
    prints |= {fingerprint(MODEL.layer), fingerprint(build(config("mixtral")).layer)}
    assert len(prints) == 6
    assert fingerprint(build(config("llama", num_layers=9), 2).layer) == fingerprint(MODEL.layer)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda plan: plan["launches"][0].update(layers_ahead=10**12), "layers_ahead is 1000000000000, expected 0.."),
        (lambda plan: plan.update(launches=plan["launches"] * 1000), "launches: expected at most 1024"),
        (lambda plan: plan["launches"][0].update(waits=[[0, 0]] * 10**5), "waits: expected at most 131072 in all"),
        (lambda plan: plan.update(tokens=10**15), "are never computed"),
        (lambda plan: plan["launches"][0].update(waits=[[10**12, 0]]), "there is no launch 1000000000000"),
    ],
    ids=["layers ahead", "launches", "waits in all", "tokens", "waits"],
)
def test_a_file_that_would_run_for_ever_is_refused_at_once(tmp_path: Path, change: Any, complaint: str) -> None:
    path = saved(tmp_path / "plans.json")
    content = json.loads(path.read_text())
    content["plans"] = content["plans"][1:2]
    content["header"]["dense_batch_tokens"] = 1
    change(content["plans"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ScheduleError, match=complaint):
        find_schedules(configured(path), MODEL, "cpu")


def test_what_would_take_gigabytes_to_validate_is_refused_by_its_size() -> None:
    """The memory goes with the square of the launches of all layers."""
    deep = build(config("llama", num_layers=4000), 2)
    with pytest.raises(ScheduleError, match="launches: expected at most 32768 in all layers together, got 10 in"):
        find_schedules(configured("sequential"), deep)
    with pytest.raises(ScheduleError, match=r"parts: expected 1\.\.102 nano-batches of 4096 tokens, got 4000"):
        find_schedules(configured("nano-batched-4000", 4096), MODEL)
    assert len(find_schedules(configured("nano-batched-102", 4096), MODEL)[0].launches) == 1020


def test_a_file_has_a_bounded_number_of_plans() -> None:
    plans = tuple(sequential(MODEL.layer, tokens) for tokens in range(1, MOST_PLANS + 2))
    header = replace(HEADER, dense_batch_tokens=1)
    assert len(ScheduleFile(header=header, plans=plans[:MOST_PLANS]).plans) == MOST_PLANS
    with pytest.raises(ScheduleError, match=f"plans: expected at most {MOST_PLANS}, got {MOST_PLANS + 1}"):
        ScheduleFile(header=header, plans=plans)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda path: path.write_bytes(b'{"header":' * 10**5), "maximum recursion"),
        (lambda path: (path.touch(), os.truncate(path, 2**40)), "expected at most 16777216 bytes, got 1099511627776"),
        (os.mkfifo, "expected a file, got something else"),
        (lambda path: path.symlink_to("/dev/zero"), "expected a file, got something else"),
    ],
    ids=["deep", "sparse", "pipe", "device"],
)
def test_a_file_that_is_none_is_not_read(tmp_path: Path, make: Any, complaint: str) -> None:
    path = tmp_path / "plans.json"
    make(path)
    with pytest.raises(ScheduleError, match=complaint):
        ScheduleFile.load(path)
