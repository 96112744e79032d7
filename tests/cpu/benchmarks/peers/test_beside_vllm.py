"""Both engines on the same workloads: what is started, and what is made of what they measured."""

import json
import os
import subprocess
import sys

import pytest
from support.places import DEMO_MODEL, ROOT

from benchmarks.peers.beside_vllm import compare, tell

STAND_IN = ROOT / "tests" / "support" / "simulated" / "vllm_package"


def run(rate, **fields):
    return {
        "workload": "8/3",
        "requests": 4,
        "input_tokens": 32,
        "output_tokens": 12,
        "total_tokens_per_s": rate,
        "timeline": [1],
        **fields,
    }


def started(seqs, *rates):
    runs = [run(rate, mean_power_w=600.0, mj_per_token=20.0) for rate in rates]
    settings = {"max_num_seqs": seqs, "max_num_batched_tokens": 8192}
    return {"quantization": "fp8", "settings": settings, **(runs[0] if len(runs) == 1 else {"runs": runs})}


def test_the_rivals_best_setting_counts_for_each_workload():
    ours = {"device": "a card", "schedule": "plan.json", "settings": {}, "runs": [run(120.0), run(300.0)]}
    found = compare(ours, [started(1024, 100.0, 150.0), started(2048, 80.0, 200.0)])
    first, second = found["rows"]
    assert (first["ratio"], first["vllm"]["total_tokens_per_s"], first["vllm"]["max_num_seqs"]) == (1.2, 100.0, 1024)
    assert (second["ratio"], second["vllm"]["total_tokens_per_s"], second["vllm"]["max_num_seqs"]) == (1.5, 200.0, 2048)
    assert found["nanoflow"]["schedule"] == "plan.json"
    assert [each["settings"]["max_num_seqs"] for each in found["vllm"]] == [1024, 2048]
    assert found["device"] == "a card"
    assert tell(first) == ("8/3, 4 requests: nanoflow 120 tokens/s; vllm 100 tokens/s at 600 W, 20.0 mJ; 1.200x")


def test_a_single_workload_is_a_row_too():
    (row,) = compare(run(50.0, settings={}), [started(1024, 100.0)])["rows"]
    assert (row["ratio"], row["workload"], row["input_tokens"]) == (0.5, "8/3", 32)
    assert "timeline" not in row["nanoflow"]


def beside(*words):
    command = [sys.executable, "-m", "benchmarks", "beside-vllm", "--model", DEMO_MODEL, *words]
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "kernels"))},
    )


def test_both_run_from_folders_with_one_command(tmp_path):
    done = beside(
        *("--workload", "40/7:3", "--workload", "8/3:2", "--output", tmp_path / "r.json", "--vllm-path", STAND_IN),
        *("--set", "kv_cache_tokens=1024", "--max-num-seqs", "8", "--max-num-seqs", "16"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert [row["workload"] for row in found["rows"]] == ["40/7", "8/3"]
    for row in found["rows"]:
        rates = [row[engine]["total_tokens_per_s"] for engine in ("nanoflow", "vllm")]
        assert row["ratio"] == pytest.approx(rates[0] / rates[1], abs=1e-4)
    assert found["nanoflow"]["settings"]["load_format"] == "dummy"
    assert [each["settings"]["max_num_seqs"] for each in found["vllm"]] == [8, 16]
    assert {path.name for path in tmp_path.iterdir()} == {
        "r.json", "r.nanoflow.json", "r.vllm-8-8192.json", "r.vllm-16-8192.json",
    }  # fmt: skip
    assert len(done.stdout.splitlines()) == 2


def test_what_is_missing_is_named_before_anything_runs(tmp_path):
    output = ("--output", tmp_path / "r.json")
    for words, message in {
        ("--workload", "8:3", *output): "--workload: expected LENGTHS:REQUESTS",
        ("--workload", "8/3:1", "--output", tmp_path): "expected a regular file",
        (
            "--workload",
            "8/3:1",
            *output,
            "--vllm-path",
            tmp_path,
        ): "expected vLLM in this interpreter or in --vllm-path",
    }.items():
        refused = beside(*words)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        assert list(tmp_path.iterdir()) == []
