"""nanoflow-search, the command."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels", "search"))
    command = [sys.executable, "-m", "nanoflow_search", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )


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


def test_bad_input_is_named() -> None:
    model = ("--model", "benchmarks/models/llama-3-8b")
    for arguments, message in {
        (*model, "--workload", "1024"): "workload: expected PROMPT/OUTPUT tokens such as 1024/512, got '1024'",
        (*model, "--workload", "1/1", "--device", "K80"): "device: expected one of A100, H100,",
        ("--model", "/nowhere", "--workload", "1/1"): "/nowhere/config.json: No such file",
    }.items():
        done = run("analyze", *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("nanoflow-search: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr
