"""The benchmark of the offline workload through the server, on a few requests."""

import json
import os
import subprocess
import sys

import pytest
from support.places import DEMO_MODEL, ROOT


def test_every_token_arrives_and_the_engine_alone_is_compared_with(tmp_path):
    alone, output = tmp_path / "alone.json", tmp_path / "served.json"
    alone.write_text(json.dumps({"workload": "7/5", "requests": 9, "total_tokens_per_s": 1e6}))
    sizes = ("--input-tokens", "7", "--output-tokens", "5", "--requests", "9", "--clients", "2")
    benchmark, model = ("-m", "benchmarks", "serving-offline"), DEMO_MODEL
    done = subprocess.run(
        [sys.executable, *benchmark, "--model", model, *sizes, "--engine-result", alone, "--output", output],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(output.read_text())
    assert (measured["workload"], measured["requests"], measured["output_tokens"]) == ("7/5", 9, 45)
    assert measured["total_tokens_per_s"] == pytest.approx(9 * 12 / measured["wall_s"], rel=0.01)
    assert measured["share_of_engine"] == pytest.approx(measured["total_tokens_per_s"] / 1e6, abs=1e-4)
    assert 1 <= measured["tokens_per_response"] <= 5
    assert "tritonserver" in measured["cpu_cores_used"]
