"""schedule "auto": a file of the cache, a short search that fills it, or sequential with the reason."""

import logging
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.places import ROOT

from benchmarks.models import checkpoints
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine, auto_schedule
from nanoflow_backend.engine.auto_schedule import COMMAND, find_auto_schedule
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.runtime.device import Device
from nanoflow_backend.schedule.file import Header, ScheduleFile, fingerprint
from nanoflow_backend.schedule.presets import sequential

GPU = Device("cuda", "synthetic H200-sustained", 132)
SYNTHETIC = (*COMMAND, "--device", "synthetic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.make("llama"), tmp_path_factory.mktemp("model"))


@pytest.fixture
def auto(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> EngineConfig:
    monkeypatch.setenv("PYTHONPATH", ":".join(str(ROOT / folder) for folder in ("", "kernels", "search")))
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(auto_schedule.log, "disabled", False)  # as import-linter leaves all that were there before it
    return EngineConfig(
        model=str(model), schedule="auto", schedule_cache=str(tmp_path / "cache"), dense_batch_tokens=250
    )


def script(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "search.py"
    path.write_text(text)
    return (sys.executable, str(path))


def test_what_is_found_is_kept(
    auto: EngineConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_schedule, "EFFORT", ("--plans", "1", "--rounds", "2", "--turns", "1"))
    found = find_auto_schedule(auto, GPU, command=SYNTHETIC)
    assert re.fullmatch(
        r".*/cache/synthetic-H200-sustained-132/[0-9a-f]{16}-2_bfloat16_tp1_1024-512_250\.json", found.schedule
    )
    assert ScheduleFile.load(Path(found.schedule)).plans[-1].tokens == 256
    assert "nanoflow-search: plans" in caplog.text
    caplog.clear()
    again = find_auto_schedule(auto, GPU, command=("/nowhere/search",))
    assert again == found
    assert "searching" not in caplog.text


def test_other_workloads_sizes_devices_and_precisions_are_other_files(auto: EngineConfig, tmp_path: Path) -> None:
    command = script(tmp_path, f"import sys; print(*sys.argv[1:], file=open({str(tmp_path / 'asked')!r}, 'a'))")
    arms = {
        auto: GPU,
        EngineConfig(**{**fields(auto), "schedule_workload": "9/9"}): GPU,
        EngineConfig(**{**fields(auto), "dense_batch_tokens": None}): GPU,
        EngineConfig(**{**fields(auto), "seed": 1}): Device("cuda", "NVIDIA H100", 132),
        EngineConfig(**{**fields(auto), "dtype": "float16"}): GPU,
    }
    for config, device in arms.items():
        find_auto_schedule(config, device, command=command)
    asked = [line.split() for line in (tmp_path / "asked").read_text().splitlines()]
    assert len({arguments[arguments.index("--out") + 1] for arguments in asked}) == 5
    assert "--dense-batch-tokens" not in asked[2]
    for arguments in asked:
        assert arguments[:4] == ["--model", auto.model, "--tp", "1"]
    assert [arguments[5] for arguments in asked] == ["1024/512", "9/9", *["1024/512"] * 3]
    dtypes = [arguments[arguments.index("--dtype") + 1] for arguments in asked]
    assert dtypes == [*["bfloat16"] * 4, "float16"]
    assert asked[0][asked[0].index("--dense-batch-tokens") + 1] == "256"


def fields(config: EngineConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("print('profile'); raise SystemExit('no GPU is free')", r"the search failed \(1\): no GPU is free"),
        ("print('found nothing')", r"the search failed \(0\): found nothing"),
        ("import time; print('profile', flush=True); time.sleep(600)", "took more than 0.01 minutes: the next load"),
    ],
    ids=["fails", "writes nothing", "too long"],
)
def test_without_a_file_it_is_sequential(
    auto: EngineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, why: str
) -> None:
    found = find_auto_schedule(auto, GPU, command=script(tmp_path, text), minutes=0.01)
    assert found.schedule == "sequential"
    assert re.search(f"WARNING .* schedule auto: sequential, for .*{why}", caplog.text)


def test_without_the_search_package_it_is_sequential(
    auto: EngineConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_schedule, "find_spec", lambda name: None)
    assert find_auto_schedule(auto, GPU).schedule == "sequential"
    assert "nanoflow_search and scipy cannot be imported: pip install 'nanoflow-triton[search]'" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_reason_not_to_serve(
    auto: EngineConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    assert find_auto_schedule(auto, GPU, command=SYNTHETIC).schedule == "sequential"
    assert "sequential, for [Errno" in caplog.text


@pytest.fixture
def whole(model: Path, auto: EngineConfig, tmp_path: Path) -> Path:
    """A file that an engine on GPU can run."""
    graphs = build(read_model_config(model))
    header = Header(
        model_fingerprint=fingerprint(*graphs.layers),
        precision=auto.precision_on("cuda"),
        device=GPU.name,
        device_sms=GPU.sms,
        tensor_parallel=1,
        dense_batch_tokens=256,
    )
    path = tmp_path / "whole.json"
    ScheduleFile(header=header, plans=(sequential(graphs.layer, 256),)).save(path)
    return path


def finds(tmp_path: Path, file: Path) -> tuple[str, ...]:
    """A search that ends with this file."""
    return script(tmp_path, f"import shutil, sys; shutil.copy({str(file)!r}, sys.argv[sys.argv.index('--out') + 1])")


FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "another version": (
        lambda text: text.replace('"format_version": 3', '"format_version": 1'),
        "format version 1, this engine reads 3",
    ),
    "another model": (
        lambda text: re.sub(r'"model_fingerprint": "\w+"', '"model_fingerprint": "0123456789abcdef"', text),
        "made for something else: model_fingerprint is '0123456789abcdef' in the file",
    ),
    "another device": (
        lambda text: text.replace(GPU.name, "NVIDIA H100"),
        "made for something else: device is 'NVIDIA H100' in the file",
    ),
    "invalid": (lambda text: text.replace('"stop": 256', '"stop": 255', 1), "tokens 255..256 are never computed"),
    "cut": (lambda text: text[:-9], "Input data was truncated"),
}


@pytest.mark.parametrize(("spoil", "why"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_could_not_run_is_found_again(
    auto: EngineConfig, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture, spoil, why: str
) -> None:
    path = Path(find_auto_schedule(auto, GPU, command=finds(tmp_path, whole)).schedule)
    path.write_text(spoil(path.read_text()))
    assert path.read_bytes() != whole.read_bytes()
    assert find_auto_schedule(auto, GPU, command=finds(tmp_path, whole)).schedule == str(path)
    assert path.read_bytes() == whole.read_bytes()
    assert re.search(f"schedule auto: .*{re.escape(why)}.*; searching again", caplog.text)


@pytest.mark.parametrize(("spoil", "why"), FAULTS.values(), ids=FAULTS)
def test_a_search_that_finds_what_cannot_run_is_no_reason_not_to_serve(
    auto: EngineConfig, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture, spoil, why: str
) -> None:
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text(spoil(whole.read_text()))
    assert find_auto_schedule(auto, GPU, command=finds(tmp_path, spoilt)).schedule == "sequential"
    assert re.search(f"schedule auto: sequential, for .*{re.escape(why)}", caplog.text)


def test_a_file_of_smaller_steps_than_must_run_is_left_to_others(
    auto: EngineConfig, tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = EngineConfig(**{**fields(auto), "dense_batch_tokens": None, "max_running": 512})
    for command in (finds(tmp_path, whole), ("/nowhere/search",)):
        caplog.clear()
        assert find_auto_schedule(wide, GPU, command=command).schedule == "sequential"
        assert "sequential, for max_running: expected at most dense_batch_tokens (256)" in caplog.text


def test_engines_that_load_together_search_once(auto: EngineConfig, tmp_path: Path, whole: Path) -> None:
    """The search takes long enough for all of them to have come."""
    log = tmp_path / "log"
    command = script(
        tmp_path,
        f"import shutil, sys, time; open({str(log)!r}, 'a').write('searched\\n'); time.sleep(0.3);"
        f"shutil.copy({str(whole)!r}, sys.argv[sys.argv.index('--out') + 1])",
    )
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(find_auto_schedule(auto, GPU, command=command).schedule))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert log.read_text() == "searched\n"


def test_an_engine_on_a_cpu_runs_sequential(auto: EngineConfig, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(EngineConfig(**{**fields(auto), "device": "cpu"}))
    assert engine.config.schedule == "sequential"
    assert "sequential, for on a CPU nothing runs side by side" in caplog.text


def test_a_workload_is_two_lengths() -> None:
    with pytest.raises(
        ConfigError, match="schedule_workload: expected PROMPT/OUTPUT tokens such as 1024/512, got '1/0'"
    ):
        EngineConfig(model="m", schedule_workload="1/0")
