"""The real perf_analyzer drives the demo model as perf_analyzer_configs/README.md says, and the report is right."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import DEMO_MODEL, ROOT

CONFIGS = ROOT / "perf_analyzer_configs"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


@pytest.fixture(scope="module")
def perf_analyzer(tmp_path_factory):
    """The one of `make perf-analyzer`, else one of our own; there is none where pip reaches no package index."""
    installed = Path(sys.prefix, "bin", "perf_analyzer")
    if installed.exists():
        return installed
    spec = importlib.util.spec_from_file_location("get_perf_analyzer", CONFIGS / "get_perf_analyzer.py")
    get_perf_analyzer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(get_perf_analyzer)
    bundled = Path(importlib.util.find_spec("pytriton").origin).parents[1] / "nvidia_pytriton.libs"
    prefix = tmp_path_factory.mktemp("perf_analyzer")
    (prefix / "bin").mkdir()
    try:
        return get_perf_analyzer.install(prefix, bundled)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip could not download {get_perf_analyzer.WHEEL}: {error}")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make = [sys.executable, CONFIGS / "make_inputs.py", "--model", DEMO_MODEL, "--output", folder]
    subprocess.run([*make, "--prompts", "30", "--scale", "0.25"], check=True, env=ENVIRONMENT, timeout=120)
    return folder


def sweep(demo, perf_analyzer, *arguments, **settings):
    environment = {"URL": demo.grpc_url, "PYTHON": sys.executable, "PERF_ANALYZER": str(perf_analyzer), **settings}
    command = [CONFIGS / "sweep.sh", *map(str, arguments)]
    return subprocess.run(
        command, env={**ENVIRONMENT, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


SWEEPS = {  # mode: settings, what the export calls its loads, requests of each
    "concurrency": ({"LEVELS": "1 3", "REQUESTS": "4"}, {"concurrency_1.json": 4, "concurrency_3.json": 12}),
    "poisson": ({"LEVELS": "10", "REQUESTS": "1"}, {"poisson_10.json": 10}),
    # perf_analyzer stops at a request with fewer responses than the period; on a busy machine tokens come together.
    "periodic": ({"RAMP": "2:6:2", "REQUEST_PERIOD": "1"}, {"periodic.json": 6}),
}


@pytest.mark.parametrize("mode", SWEEPS)
def test_a_sweep_and_its_report(demo, perf_analyzer, inputs, tmp_path, mode):
    settings, loads = SWEEPS[mode]
    done = sweep(demo, perf_analyzer, mode, inputs / "short.json", tmp_path / "results" / mode, **settings)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "results" / mode
    rows = {row["file"]: row for row in json.loads((results / "report.json").read_text())["experiments"]}
    assert rows.keys() == loads.keys()
    for file, requests in loads.items():
        assert rows[file]["requests"] >= requests
        # Every token arrived: 32 in and 32 out of workloads.json, at a quarter.
        assert (rows[file]["mean_input_tokens"], rows[file]["mean_output_tokens"]) == (8, 8)
        assert 0 < rows[file]["time_to_first_token_ms"]["p50"] <= rows[file]["request_latency_ms"]["p99"]
    assert (results / "report.svg").read_text().startswith("<svg")


def test_a_sweep_says_what_is_wrong(demo, perf_analyzer, inputs, tmp_path):
    usage = sweep(demo, perf_analyzer, "concurrency")
    assert usage.returncode == 2
    assert "perf_analyzer_configs/sweep.sh poisson INPUTS.json RESULTS" in usage.stderr
    assert usage.stderr.rstrip().endswith("PERF_ANALYZER=${PERF_ANALYZER:-.venv/bin/perf_analyzer}")  # all settings
    assert "unknown mode burst" in sweep(demo, perf_analyzer, "burst", inputs / "short.json", tmp_path / "x").stderr
    (tmp_path / "taken").mkdir()
    assert sweep(demo, perf_analyzer, "periodic", inputs / "short.json", tmp_path / "taken").returncode == 1
    nobody = sweep(demo, perf_analyzer, "poisson", inputs / "short.json", tmp_path / "y", MODEL="nobody", LEVELS="1")
    assert nobody.returncode == 1
    assert "nobody" in nobody.stderr
