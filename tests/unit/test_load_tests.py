"""perf_analyzer_configs/: inputs have exactly the lengths they claim, and reports the figures of their export."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.places import DEMO_MODEL, ROOT

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.text.tokenizer import Tokenizer

CONFIGS = ROOT / "perf_analyzer_configs"
WORKLOADS = json.loads((CONFIGS / "workloads.json").read_text())


def run(script, *arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, CONFIGS / script, *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module", params=["byte-level BPE, as Llama-3's", "SentencePiece, as Llama-2's"])
def model(request, tmp_path_factory):
    """A folder with a tokenizer that knows words."""
    if request.param.startswith("byte"):
        return DEMO_MODEL
    corpus = (ROOT / "docs" / "architecture.md").read_text().splitlines()
    return tiny_tokenizers.llama2(tmp_path_factory.mktemp("llama2"), corpus, vocab_size=1000)


@pytest.fixture(scope="module")
def inputs(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    made = run("make_inputs.py", "--model", model, "--output", folder, "--prompts", 20)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_have_exactly_their_length(inputs, model, name):
    tokenizer = Tokenizer.from_pretrained(model)
    entries = json.loads((inputs / f"{name}.json").read_text())["data"]
    kinds = [WORKLOADS[kind] for kind in WORKLOADS[name].get("mix", [name])]
    lengths = {(kind["input_tokens"], kind["output_tokens"]) for kind in kinds}
    assert len(entries) == 20
    for entry in entries:
        sampling = json.loads(entry["sampling_parameters"][0])
        assert (len(tokenizer.encode(entry["text_input"][0])), sampling["max_tokens"]) in lengths
        assert (sampling["min_tokens"], sampling["ignore_eos"]) == (sampling["max_tokens"], True)
    lines = [json.loads(line) for line in (inputs / f"{name}.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [entry["text_input"][0] for entry in entries]
    assert len({line["text"] for line in lines}) == 20


def test_prefixes_are_shared_as_token_ids(inputs, model):
    tokenizer = Tokenizer.from_pretrained(model)
    entries = json.loads((inputs / "shared_prefix.json").read_text())["data"]
    ids = [tokenizer.encode(entry["text_input"][0]) for entry in entries]
    shared = WORKLOADS["shared_prefix"]["prefix_tokens"]
    assert 1 < len({tuple(prompt[:shared]) for prompt in ids}) <= WORKLOADS["shared_prefix"]["prefixes"]
    assert len({tuple(prompt[shared:]) for prompt in ids}) == len(ids)


def test_a_tokenizer_without_words_is_refused(tmp_path):
    tiny_tokenizers.llama3(tmp_path / "tokenizer")
    made = run("make_inputs.py", "--model", tmp_path / "tokenizer", "--output", tmp_path / "inputs")
    assert (made.returncode, made.stdout) == (1, "")
    assert "make_inputs.py: expected 100 words or more that are one token, got" in made.stderr


def exported(*requests, mode="concurrency", value=2, switches=True):
    """An export as perf_analyzer writes it; a request is (sent ms, [(response ms, tokens), ...])."""
    garbage = {"finish_reason": "", "total_output_tokens": 4227858608}  # as it writes for what was not sent
    made = [
        {
            "timestamp": int(1e18) + int(sent_ms * 1e6),
            "request_inputs": {"return_num_output_tokens": switches, "return_num_input_tokens": switches},
            "response_timestamps": [int(1e18) + int(at_ms * 1e6) for at_ms, _ in responses],
            "response_outputs": [{**garbage, "num_output_tokens": n, "num_input_tokens": 7} for _, n in responses],
        }
        for sent_ms, responses in requests
    ]
    return {"experiments": [{"experiment": {"mode": mode, "value": value}, "requests": made}]}


def report(folder, export, slo=None):
    (folder / "export.json").write_text(json.dumps(export))
    (folder / "slo.json").write_text(json.dumps(slo or {}))
    return run("report.py", folder / "export.json", "--slo", folder / "slo.json", "--output", folder / "report")


def test_the_figures_of_a_report(tmp_path):
    requests = (
        (100, [(150, 1), (170, 2), (200, 1)]),  # first 50, all 100 for 4 tokens, then 50 for 3
        (100, [(400, 1), (500, 1)]),  # first 300, all 400 for 2, then 100 for 1
        (200, [(1100, 4)]),  # first and all 900 for 4
    )
    done = report(tmp_path, exported(*requests), {"time_to_first_token_ms": 300, "time_per_output_token_ms": 20})
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "report.json").read_text())["experiments"]
    assert (row["file"], row["concurrency"], row["requests"], row["duration_s"]) == ("export.json", 2, 3, 1.0)
    rates = [row[f"{name}_per_s"] for name in ("requests", "input_tokens", "output_tokens", "goodput_requests")]
    assert rates == [3.0, 21.0, 10.0, 1.0]
    expected = {
        "time_to_first_token_ms": [50, 300, 900],
        "time_per_output_token_ms": [50 / 3, 100, 0],
        "request_latency_ms": [100, 400, 900],
        "normalized_latency_ms": [25, 200, 225],
        "inter_token_latency_ms": [20, 30, 100],
    }
    for name, values in expected.items():
        assert row[name]["mean"] == pytest.approx(np.mean(values))
        assert row[name]["p50"] == pytest.approx(sorted(values)[1])
        assert row[name]["p99"] == pytest.approx(np.percentile(values, 99))
    assert row["mean_tokens_per_response"] == pytest.approx(10 / 6)
    (line,) = csv.DictReader((tmp_path / "report.csv").open())
    assert float(line["normalized_latency_ms_p50"]) == pytest.approx(200)
    assert (tmp_path / "report.svg").read_text().count("<polyline") == 6


@pytest.mark.parametrize(
    ("export", "slo", "message"),
    [
        (exported((0, [(1, 1)]), switches=False), {}, "a request without return_num_output_tokens"),
        (exported((0, [])), {}, "a request without a response"),
        (exported((0, [(1, 1)])), {"ttft": 5}, "unknown ttft; known are time_to_first_token_ms"),
    ],
)
def test_what_cannot_be_reported_is_said(tmp_path, export, slo, message):
    done = report(tmp_path, export, slo)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "report.json").exists()


def test_an_export_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.json").touch()
    (tmp_path / "other.json").write_text("{}")
    for file, message in (("empty", "expected JSON: Expecting value"), ("other", "found no 'experiments'")):
        done = run("report.py", tmp_path / f"{file}.json", "--output", tmp_path / "report")
        assert done.returncode == 1
        assert done.stderr.startswith(f"report.py: {tmp_path / file}.json: expected ")
        assert message in done.stderr


FAULTS = {  # what perf_analyzer leaves when it loses results: (status, export), and what the sweep says
    "empty": ("exit 0", "", "periodic.json: expected JSON: Expecting value"),
    "cut off": ("exit 0", '{"experiments":[{"requests":[', "periodic.json: expected JSON: Expecting value"),
    "short": ("exit 0", json.dumps(exported((0, [(1, 1)]))), "periodic.json: expected 3 requests, found 1"),
    "signal": ("kill -TERM $$", "", "ended by signal 15"),
}


def sweep(folder, *attempts, **settings):
    """A periodic sweep to 3 clients of a perf_analyzer that leaves these (shell command, export), one after another."""
    for number, (command, export) in enumerate(attempts, start=1):
        (folder / f"{number}.json").write_text(export)
        (folder / f"{number}.sh").write_text(f"echo attempt {number}\n{command}\n")
    perf_analyzer = folder / "perf_analyzer"
    perf_analyzer.write_text(
        f"#!/bin/sh\ncd {folder}\n[ ! -e results/exports/periodic.json ] || exit 99\n"  # as the real one
        "echo >>calls\nn=$(wc -l <calls)\ncp $n.json results/exports/periodic.json\n. ./$n.sh\n"
    )
    perf_analyzer.chmod(0o755)
    environment = {"PERF_ANALYZER": str(perf_analyzer), "PYTHON": sys.executable, "RAMP": "1:3:1", **settings}
    command = [CONFIGS / "sweep.sh", "periodic", "inputs.json", folder / "results"]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)


WHOLE = ("exit 0", json.dumps(exported(*[(0, [(1, 1)])] * 3)))


def test_what_perf_analyzer_loses_is_said_and_measured_again(tmp_path):
    done = sweep(tmp_path, *((command, export) for command, export, _ in FAULTS.values()), WHOLE)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("sweep.sh: ")]
    assert len(said) == len(FAULTS)
    for number, (line, (_, _, message)) in enumerate(zip(said, FAULTS.values(), strict=True), start=1):
        assert f"periodic, attempt {number} of 5: perf_analyzer lost its results" in line
        assert message in line
    (row,) = json.loads((tmp_path / "results" / "report.json").read_text())["experiments"]
    assert row["requests"] == 3


def test_a_sweep_whose_results_stay_lost_fails(tmp_path):
    done = sweep(tmp_path, *[("exit 0", "")] * 2, WHOLE, ATTEMPTS="2")
    assert done.returncode == 1
    assert "attempt 2 of 2: perf_analyzer lost its results" in done.stderr
    assert not (tmp_path / "results" / "report.json").exists()


def test_an_error_that_perf_analyzer_reports_ends_the_sweep(tmp_path):
    done = sweep(tmp_path, ("echo no such model; exit 99", ""), WHOLE)
    assert (done.returncode, done.stderr) == (1, "attempt 1\nno such model\n")


@pytest.mark.parametrize("file", sorted((CONFIGS / "slo").iterdir()), ids=lambda file: file.stem)
def test_the_slo_files_are_read(tmp_path, file):
    done = report(tmp_path, exported((0, [(1, 1)])), json.loads(file.read_text()))
    assert "goodput 1000.00 requests/s" in done.stdout
