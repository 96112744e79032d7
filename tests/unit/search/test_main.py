"""nanoflow-search, the command."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nanoflow_search.__main__ import main
from support.places import ROOT


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "search"))
    command = [sys.executable, "-m", "nanoflow_search", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command that is refused says; in this process, since starting one takes longer than a refusal."""

    def refusal(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["nanoflow-search", *arguments])
        with pytest.raises(SystemExit) as end:  # any other exception would be a traceback
            main()
        said = capsys.readouterr().err
        if isinstance(end.value.code, str):  # the interpreter prints it, and exits with 1
            return said + end.value.code
        assert end.value.code == 2
        return said

    return refusal


def test_analyze_prints_what_bounds_a_model() -> None:
    done = run("analyze", "--model", "benchmarks/models/llama-3-8b", "--workload", "1024/512", "--device", "A100")
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if "A100" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[:2] == ["A100", "1024/512"]
    assert cells[6] == "0.68"  # T_R, as in the paper's Fig. 3
    assert cells[-1] == "compute"


def test_a_model_that_does_not_fit_is_said_to() -> None:
    done = run("analyze", "--model", "benchmarks/models/llama-2-70b", "--workload", "512/512", "--device", "H100")
    assert "weights do not fit" in done.stdout


def test_a_search_from_end_to_end_and_what_it_explains(tmp_path: Path) -> None:
    """On the synthetic device, a small size and few rounds; the same command again does nothing again."""
    out = tmp_path / "schedule.json"
    effort = ("--dense-batch-tokens", "256", "--turns", "1", "--rounds", "2", "--plans", "2", "--device", "synthetic")
    search = ("--model", "benchmarks/models/llama-3-8b", "--tp", "1", "--workload", "1024/512", "--out", str(out))
    done = run(*search, *effort)
    assert done.returncode == 0, done.stderr
    assert "qkv 256 on 132 SMs" in done.stderr
    header, *rows = (line for line in done.stdout.splitlines() if line[:1] in "┃│")
    columns = [cell.strip() for cell in header.strip("┃").split("┃")]
    assert columns[:8] == ["B_dense", "workload", "plan", "predicted", "measured", "error", "gain", "95 %"]
    assert [row.split("│")[3].strip() for row in rows] == ["sequential", "plan 1", "plan 2"]
    kept = json.loads(out.with_suffix(".result.json").read_text())
    assert [trial["plan"] for trial in kept["trials"]] == ["sequential", "plan 1", "plan 2"]
    assert kept["model"] == "llama-3-8b"
    assert kept["profile"]["hash"] == json.loads(out.read_text())["header"]["profile_hash"]
    assert "plans" in kept["phases_s"], "programs were solved"
    assert all(seconds > 0 for seconds in kept["phases_s"].values())
    written = out.read_bytes()
    again = run(*search, *effort)
    assert again.returncode == 0, again.stderr
    assert "SMs" not in again.stderr
    assert done.stdout == again.stdout, "the solver has nothing to say"
    assert out.read_bytes() == written
    known = json.loads(out.with_suffix(".result.json").read_text())
    assert "plans" not in known["phases_s"]
    assert known["trials"] == kept["trials"]

    told = run("explain", str(out))
    assert told.returncode == 0, told.stderr
    for words in (
        "synthetic H200-sustained, 132 SMs, TP 1",
        "solver HiGHS, gap 0",
        "..256 tokens: ",
        "256 tokens, 1024/512: ",
        "best was plan",
        "the bound is ",
    ):
        assert words in told.stdout


def test_a_profile_in_fp8_is_of_another_layer_and_says_its_precision(tmp_path: Path) -> None:
    """With the options that the engine passes on; on the synthetic device."""
    headers = []
    for number, words in enumerate(((), ("--quantization", "fp8", "--kv-cache-dtype", "fp8_e4m3"))):
        out = tmp_path / f"{number}.json"
        model = ("--model", "benchmarks/models/llama-3-8b", "--workload", "1024/512", "--out", str(out))
        size = ("--dense-batch-tokens", "256", "--until", "profile", "--device", "synthetic")
        done = run(*model, *size, "--dtype", "bfloat16", *words)
        assert done.returncode == 0, done.stderr
        headers.append(json.loads(out.with_suffix(".profile.json").read_text())["header"])
    plain, fp8 = headers
    assert "gate_up_quantise 256 on 132 SMs" in done.stderr
    assert fp8["model_fingerprint"] != plain["model_fingerprint"]
    assert (plain["precision"]["kv"], fp8["precision"]["kv"]) == ("bfloat16", "float8_e4m3fn")
    assert fp8["precision"]["weights"] == plain["precision"]["weights"] == "bfloat16"


def test_analyze_says_what_fp8_changes() -> None:
    model = ("--model", "benchmarks/models/llama-3-8b", "--workload", "1024/512")
    fp8 = ("--quantization", "fp8", "--kv-cache-dtype", "fp8_e4m3")
    plain, done = run("analyze", *model), run("analyze", *model, *fp8)
    assert done.returncode == 0, done.stderr
    assert "8.03e9 parameters of 1.1 bytes, KV cache float8_e4m3fn, TP 1" in done.stdout
    rates = []
    for shown in (plain, done):
        row = next(line for line in shown.stdout.splitlines() if "H200-sustained" in line)
        rates.append(float(row.split("│")[8].replace(",", "")))
    assert rates[1] / rates[0] == pytest.approx(8.03 / (1.051 + 6.979 * 667 / 1261), rel=0.002)
    assert "no FP8 products" in next(line for line in done.stdout.splitlines() if "A100" in line)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]) -> None:
    monkeypatch.chdir(ROOT)
    model, workload = ("--model", "benchmarks/models/llama-3-8b"), ("--workload", "1/1")
    out = ("--out", str(tmp_path / "schedule.json"))
    for arguments, message in {
        (*model, *workload): "Invalid value for --out",
        (*workload, *out): "Invalid value for --model",
        (*model, *out): "Invalid value for --workload",
        (*out, "analyze", *model, *workload): "Invalid value for --out: stands before analyze",
        (*model, *workload, *out, "--dense-batch-tokens", "100"): "expected a multiple of 128 from 256 on, got 100",
        (*model, "--workload", "1", *out): "workload: expected PROMPT/OUTPUT tokens such as 1024/512, got '1'",
        (
            *model,
            *workload,
            *out,
            "--kv-cache-dtype",
            "float16",
        ): "kv_cache_dtype: expected bfloat16, as dtype is, or fp8",
        (*model, *workload, *out, "--until", "plans"): "there is no profile, and no GPU here",
        ("explain", str(tmp_path / "absent.json")): "absent.json: No such file or directory",
    }.items():
        assert message in refusal(*arguments)


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]) -> None:
    monkeypatch.chdir(ROOT)
    model = ("--model", "benchmarks/models/llama-3-8b")
    for arguments, message in {
        (*model, "--workload", "1024"): "workload: expected PROMPT/OUTPUT tokens such as 1024/512, got '1024'",
        (*model, "--workload", "1/1", "--device", "K80"): "device: expected one of A100, H100,",
        ("--model", "/nowhere", "--workload", "1/1"): "/nowhere: there is no such folder",
    }.items():
        said = refusal("analyze", *arguments)
        assert said.startswith("nanoflow-search: ")
        assert message in said


def test_a_refusal_from_the_shell_is_one_line_and_status_1() -> None:
    done = run("analyze", "--model", "/nowhere", "--workload", "1/1")
    assert done.returncode == 1
    assert done.stderr.startswith("nanoflow-search: /nowhere: there is no such folder")
    assert done.stderr.count("\n") == 1


def test_what_could_not_be_written_or_loaded_is_not_searched_for(tmp_path: Path, refusal: Callable[..., str]) -> None:
    search = ("--model", "benchmarks/models/llama-3-70b", "--workload", "1024/512", "--device", "synthetic")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").touch()
    out = tmp_path / "folder.json"
    assert refusal(*search, "--out", str(out)) == f"nanoflow-search: {out}: expected a regular file, got something else"
    out = tmp_path / "file" / "below" / "plan.json"
    assert refusal(*search, "--out", str(out)) == f"nanoflow-search: {out.parent}: Not a directory"
    out = tmp_path / "plan.json"
    said = refusal(*search, "--out", str(out), "--tp", "16")
    assert said == "nanoflow-search: --tp: expected 1, 2, 4 or 8, got 16"
    assert not list(tmp_path.glob("plan*"))
