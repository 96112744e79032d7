"""The command line: batch files, one prompt, the offline benchmark."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoints
import pytest
import tiny_tokenizers

from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("model"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size), folder)


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "nanoflow_backend", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, timeout=120)


def write_lines(path: Path, lines: list) -> Path:
    texts = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"".join(text + b"\n" for text in texts))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_batch_keeps_the_order_and_turns_bad_lines_into_errors(model, tmp_path):
    lines = [
        {"prompt": "The quick brown fox", "max_tokens": 30, "temperature": 0, "id": "long"},
        {"prompt_token_ids": [5, 6, 7], "max_tokens": "3", "temperature": 0},
        b"{not json",
        {"max_tokens": 3},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": 7},
        {"prompt_token_ids": ["x"]},
        {"prompt_token_ids": [10**6]},
        {"prompt": "a", "temprature": 1},
        {"prompt": "a", "top_p": 2, "id": {"any": "json"}},
        b'{"prompt": "\xff"}',
        b'{"prompt": ' * 20_000,
        {"prompt": "over the lazy dog", "max_tokens": 2, "temperature": 0},
    ]
    output = tmp_path / "out.jsonl"
    done = run("batch", "--model", model, "--input", write_lines(tmp_path / "in.jsonl", lines), "--output", output)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "nanoflow: 3 lines done, 10 failed"
    results = read_lines(output)
    assert [r["id"] for r in results] == ["long", 1, 2, 3, 4, 5, 6, 7, 8, {"any": "json"}, 10, 11, 12]
    errors = {r["id"]: r["error"] for r in results[2:9]}
    expected = {
        2: "expected a JSON object",
        3: "expected either prompt or prompt_token_ids",
        4: "expected either prompt or prompt_token_ids",
        5: "prompt: Expected `str`, got `int`",
        6: "prompt_token_ids: Expected `int`, got `str`",
        7: "prompt: expected token ids in 0..",
        8: "temprature: unknown sampling parameter",
    }
    assert errors.keys() == expected.keys()
    for number, message in expected.items():
        assert message in errors[number]
    assert "top_p: expected a number in (0, 1]" in results[9]["error"]
    assert "'utf-8' codec can't decode byte 0xff" in results[10]["error"]
    assert "recursion" in results[11]["error"]
    engine = Engine.from_pretrained(model)
    (alone,) = engine.generate(["The quick brown fox"], SamplingParams(max_tokens=30, temperature=0.0))
    assert results[0] == {
        "id": "long",
        "text": alone.text,
        "token_ids": alone.token_ids,
        "finish_reason": alone.finish_reason,
        "num_input_tokens": alone.num_input_tokens,
        "num_output_tokens": len(alone.token_ids),
    }
    assert (results[1]["num_input_tokens"], results[1]["num_output_tokens"]) == (3, 3)

    again = run("batch", "--model", model, "--input", tmp_path / "in.jsonl", "--output", output)
    assert again.returncode == 1, "a run that continues counts the errors of the one before it"
    assert again.stderr.splitlines()[-1] == "nanoflow: 3 lines done, 10 failed"
    assert read_lines(output) == results


def test_a_killed_batch_goes_on_where_it_was(model, tmp_path):
    lines = [{"prompt": f"page {number}", "max_tokens": 40, "temperature": 0} for number in range(120)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert run("batch", "--model", model, "--input", source, "--output", whole).returncode == 0

    arguments = ("batch", "--model", model, "--input", source, "--output", output, "--set", "dense_batch_tokens=8")
    first = subprocess.Popen(command(*arguments), env=environment(), stderr=subprocess.DEVNULL)
    while not (output.exists() and output.read_bytes().count(b"\n") >= 3):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = output.read_bytes().count(b"\n")
    assert 3 <= finished < len(lines)
    with output.open("ab") as file:
        file.write(b'{"id": 99, "te')  # what a kill in mid-write leaves
    before = output.read_bytes().rsplit(b"\n", 1)[0]
    done = run(*arguments)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "nanoflow: 120 lines done, 0 failed")
    assert output.read_bytes().startswith(before), "finished lines are kept as they are"
    assert read_lines(output) == read_lines(whole)


def test_batch_refuses_an_output_of_another_input(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "id": "x"}])
    output = write_lines(tmp_path / "out.jsonl", [{"id": "y", "error": "old"}])
    done = run("batch", "--model", model, "--input", source, "--output", output)
    assert done.returncode == 1
    assert done.stderr.startswith("nanoflow: ")
    assert "line 0 is not the result of the input's line 0 (id 'x')" in done.stderr
    assert read_lines(output) == [{"id": "y", "error": "old"}]


def test_batch_never_writes_over_its_input(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a", "id": "x"}])
    done = run("batch", "--model", model, "--input", source, "--output", source)
    assert done.returncode == 1
    assert "in.jsonl: expected another file than the input" in done.stderr
    assert read_lines(source) == [{"prompt": "a", "id": "x"}]


def test_generate_prints_prompt_and_text(model):
    (alone,) = Engine.from_pretrained(model).generate(["The dog"], SamplingParams(max_tokens=12, temperature=0.0))
    done = run("generate", "--model", model, "--prompt", "The dog", "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The dog{alone.text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "nowhere/config.json: No such file"),
        (("--set", "page_tokens"), "--set page_tokens: expected field=value"),
        (("--set", "page_tokens=0"), "page_tokens: expected an integer >= 1 or null, got 0"),
        (("--set", "model=x"), "--set model=x: expected the model as --model"),
        (("--top-p", "3"), "top_p: expected a number in (0, 1], got 3.0"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(model, arguments, message):
    done = run("generate", "--prompt", "a", *(() if "--model" in arguments else ("--model", model)), *arguments)
    assert_one_line(done, message)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "model.safetensors: not a whole safetensors file"),
        ("tokenizer.json", "tokenizer.json: not a valid tokenizer"),
    ],
)
def test_a_broken_folder_is_one_line_without_a_traceback(model, tmp_path, file, message):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(b"{")
    assert_one_line(run("generate", "--prompt", "a", "--model", tmp_path / "model"), message)


def test_an_output_that_cannot_be_written_is_named(model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    done = run("batch", "--model", model, "--input", source, "--output", tmp_path / "nowhere" / "out.jsonl")
    assert_one_line(done, "nowhere/out.jsonl: No such file or directory")


def assert_one_line(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_offline_counts_what_it_processed(model, tmp_path):
    result = tmp_path / "result.json"
    sizes = ("--input-tokens", "40", "--output-tokens", "7", "--requests", "9")
    done = run("bench", "offline", "--model", model, *sizes, "--output", result, "--set", "dense_batch_tokens=64")
    assert done.returncode == 0, done.stderr
    measured = json.loads(result.read_text())
    assert (measured["workload"], measured["requests"]) == ("40/7", 9)
    assert (measured["input_tokens"], measured["output_tokens"]) == (360, 63)
    assert 423 / measured["total_tokens_per_s"] == pytest.approx(measured["wall_s"], abs=6e-4)  # given in ms
    assert 0.3 < measured["dense_batch_fill"] <= 1
    assert 0 < measured["kv_use_mean"] <= measured["kv_use_max"] <= 1
    assert {"command", "date", "device", "versions", "model", "engine", "schedule"} <= measured.keys()
    assert measured["settings"]["dense_batch_tokens"] == 64
    assert measured["steady"].startswith("too short: ")
    optimum = measured["gemm"]["per_s"] / (2 * measured["work"]["parameters"])
    assert measured["share_of_eq5"] == pytest.approx(measured["total_tokens_per_s"] / optimum, abs=1e-3)
    points = measured["timeline"]
    assert sum(point["prefill_tokens"] for point in points) == 360
    assert sum(point["sampled_rows"] for point in points) == 63, "prefills give the first token"
    assert sum(point["decode_tokens"] for point in points) == 63 - 9


def test_bench_offline_draws_lengths_and_runs_as_it_is_told(model):
    flags = ("--set", "async_scheduling=false", "--set", "cuda_graphs=false")
    done = run("bench", "offline", "--model", model, "--dataset", "lmsys-like", "--requests", "3", *flags)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert (measured["workload"], measured["requests"]) == ("lmsys-like", 3)
    assert "in 102 ± 169, out 222 ± 210, seed 0" in measured["lengths_drawn"]
    assert measured["settings"]["async_scheduling"] is False
    assert measured["settings"]["cuda_graphs"] is False


def test_bench_online_measures_each_level(model):
    levels = ("--concurrency", "1", "--concurrency", "3")
    sizes = ("--input-tokens", "12", "--output-tokens", "5", "--requests", "2")
    done = run("bench", "online", "--model", model, *sizes, *levels)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["workload"] == "12/5"
    assert [(level["concurrency"], level["requests"]) for level in measured["levels"]] == [(1, 2), (3, 3)]
    for level in measured["levels"]:
        for times in (level["first_token_ms"], level["between_tokens_ms"]):
            assert 0 < times["p50"] <= times["p90"] <= times["p99"] < 1e3 * level["wall_s"]
    alone = measured["single_stream"]
    assert alone["weight_read_bound_tokens_per_s"] == pytest.approx(
        alone["memory"]["per_s"] / alone["weight_bytes"], rel=1e-3
    )
    assert 0 < alone["share_of_bound"] < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", ROOT / "README.md", "--dataset", "lmsys-like"), "--dataset: expected none beside --trace"),
        (("--breakdown", "--set", "device=cpu"), "--breakdown: expected a GPU, the engine runs on cpu"),
    ],
)
def test_bench_offline_names_what_does_not_go_together(model, arguments, message):
    assert_one_line(run("bench", "offline", "--model", model, *arguments), message)


def test_bench_offline_reads_a_trace(model, tmp_path):
    trace = tmp_path / "trace.csv"
    rows = ["2024-01-01 00:00:00.0000000,30,5", "2024-01-01 00:00:01.0000000,0,4", "2024-01-01 00:00:02.0000000,9,2"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    done = run("bench", "offline", "--model", model, "--trace", trace)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert (measured["workload"], measured["input_tokens"], measured["output_tokens"]) == ("trace", 39, 7)
    assert (measured["trace_rows_dropped"], measured["trace_rows_too_long"]) == (1, 0)
