"""The command line: one prompt, the offline benchmark."""

import json
import shutil
from importlib.metadata import version

import pytest
from support.commands.command_line import ROOT, assert_one_line, run, run_here

from nanoflow_backend.bench import result
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import LLM, SamplingParams


def test_generate_prints_prompt_and_text(model):
    (alone,) = LLM.from_pretrained(model).generate(["The dog"], SamplingParams(max_tokens=12, temperature=0.0))
    done = run("generate", "--model", model, "--prompt", "The dog", "--max-tokens", "12")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"The dog{alone.text}\n"


def test_weights_that_were_not_pulled_are_named(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    done = run_here("generate", "--prompt", "a", "--model", tmp_path / "model")
    assert_one_line(done, "model.safetensors: is a Git LFS pointer, not the file itself: run git lfs pull in")


def test_generate_shows_nothing_of_a_prompt_that_is_refused(model):
    done = run_here("generate", "--model", model, "--prompt", "word " * 20_000)
    assert_one_line(done, "nanoflow: ")
    assert done.stdout == ""


def test_the_version_is_that_of_the_package():
    assert run_here("--version").stdout == f"nanoflow {version('nanoflow-triton')}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nowhere"), "nowhere: there is no such folder: expected a local Hugging Face folder"),
        (("--model", "no-one/no-model"), "hf download no-one/no-model --local-dir no-model"),
        (("--set", "page_tokens"), "--set page_tokens: expected field=value"),
        (("--set", "disk_kv_cache={path"), "--set disk_kv_cache={path: expected JSON: JSON is malformed"),
        (("--set", "page_tokens=0"), "page_tokens: expected an integer >= 1 or null, below 2147483648, got 0"),
        (("--set", "model=x"), "--set model=x: expected the model as --model"),
        (("--top-p", "3"), "top_p: expected a number in (0, 1], got 3.0"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(model, arguments, message):
    done = run_here("generate", "--prompt", "a", *(() if "--model" in arguments else ("--model", model)), *arguments)
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
    assert_one_line(run_here("generate", "--prompt", "a", "--model", tmp_path / "model"), message)


def test_bench_offline_counts_what_it_processed(model, tmp_path):
    sizes = ("--input-tokens", "40", "--output-tokens", "7", "--requests", "9")
    done = run_here(
        "bench", "offline", "--model", model, *sizes, "--output", tmp_path / "r", "--set", "dense_batch_tokens=64"
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
    assert (measured["workload"], measured["requests"]) == ("40/7", 9)
    assert (measured["input_tokens"], measured["output_tokens"]) == (360, 63)
    assert 423 / measured["total_tokens_per_s"] == pytest.approx(measured["wall_s"], abs=6e-4)  # given in ms
    assert 0.3 < measured["dense_batch_fill"] <= 1
    assert 0 < measured["kv_use_mean"] <= measured["kv_use_max"] <= 1
    assert {"command", "date", "device", "versions", "model", "engine", "schedule"} <= measured.keys()
    assert f"tokens/s, prompts and outputs │ {measured['total_tokens_per_s']:,.0f} " in " ".join(done.stdout.split())
    assert "steady part: too short: " in done.stdout
    assert measured["settings"]["dense_batch_tokens"] == 64
    assert measured["steady"].startswith("too short: ")
    optimum = measured["gemm"]["per_s"] / (2 * measured["work"]["parameters"])
    assert measured["share_of_eq5"] == pytest.approx(measured["total_tokens_per_s"] / optimum, abs=1e-3)
    points = measured["timeline"]
    assert sum(point["prefill_tokens"] for point in points) == 360
    assert sum(point["sampled_rows"] for point in points) == 63, "prefills give the first token"
    assert sum(point["decode_tokens"] for point in points) == 63 - 9


def test_bench_offline_draws_lengths_and_runs_as_it_is_told(model, tmp_path):
    flags = ("--set", "async_scheduling=false", "--set", "cuda_graphs=false")
    done = run_here(
        "bench",
        "offline",
        "--model",
        model,
        "--dataset",
        "lmsys-like",
        "--requests",
        "3",
        *flags,
        "--output",
        tmp_path / "r",
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
    assert (measured["workload"], measured["requests"]) == ("lmsys-like", 3)
    assert "in 102 ± 169, out 222 ± 210, seed 0" in measured["lengths_drawn"]
    assert measured["settings"]["async_scheduling"] is False
    assert measured["settings"]["cuda_graphs"] is False


def test_bench_offline_runs_workloads_in_turn_as_if_each_were_the_first(model, tmp_path):
    """Prompts of 40 tokens fill pages of 16: those of the second run would be found there, were they the same."""
    workloads = ("--workload", "40/7:9", "--workload", "48/3:5")
    small = ("--set", "dense_batch_tokens=64", "--set", "kv_cache_tokens=4096")
    done = run_here("bench", "offline", "--model", model, *workloads, *small, "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
    first, second = measured["runs"]
    assert [(run["workload"], run["requests"]) for run in (first, second)] == [("40/7", 9), ("48/3", 5)]
    assert (first["input_tokens"], second["input_tokens"]) == (360, 240)
    assert (first["output_tokens"], second["output_tokens"]) == (63, 15)
    assert first["prefix_hit_tokens"] == second["prefix_hit_tokens"] == 0
    assert sum(point["prefill_tokens"] for point in second["timeline"]) == 240
    optimum = measured["gemm"]["per_s"] / (2 * measured["work"]["parameters"])
    for part in (first, second):
        assert part["share_of_eq5"] == pytest.approx(part["total_tokens_per_s"] / optimum, abs=1e-3)
    assert "9 requests of 40/7" in done.stdout
    assert "5 requests of 48/3" in done.stdout


def test_bench_offline_in_fp8_counts_products_at_their_own_rate(model, tmp_path):
    fp8 = ("--set", "quantization=fp8", "--set", "kv_cache_dtype=fp8_e4m3")
    done = run_here("bench", "offline", "--model", model, "--workload", "40/3:5", *fp8, "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
    assert (measured["quantization"]["method"], measured["kv_cache_dtype"]) == ("fp8", "fp8_e4m3")
    assert "kv float8_e4m3fn, products in FP8, TP 1" in measured["engine_is"]
    work = measured["work"]
    assert 0 < work["fp8_parameters"] < work["parameters"]
    rest_s = 2 * (work["parameters"] - work["fp8_parameters"]) / measured["gemm"]["per_s"]
    fp8_s = 2 * work["fp8_parameters"] / measured["gemm_fp8"]["per_s"]
    assert measured["eq5_tokens_per_s_per_device"] == pytest.approx(1 / (rest_s + fp8_s), rel=1e-4)


def test_bench_online_measures_each_level(model, tmp_path):
    levels = ("--concurrency", "1", "--concurrency", "3")
    sizes = ("--input-tokens", "12", "--output-tokens", "5", "--requests", "2")
    done = run_here("bench", "online", "--model", model, *sizes, *levels, "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
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


def test_bench_online_measures_each_rate(model, tmp_path):
    rates = ("--rate", "30", "--rate", "60", "--duration", "0.5", "--warm-up", "0.2")
    sizes, limits = ("--input-tokens", "12", "--output-tokens", "5"), ("--ttft-limit", "1e6", "--itl-limit", "1e-6")
    done = run_here("bench", "online", "--model", model, *sizes, *rates, *limits, "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
    assert (measured["workload"], measured["arrivals"]) == ("12/5", "Poisson, seed 0")
    assert measured["slo"] == {"first_token_ms": 1e6, "between_tokens_ms": 1e-6}
    assert {"command", "date", "versions", "model", "engine", "schedule", "settings"} <= measured.keys()
    for rate, asked in zip(measured["rates"], (30, 60), strict=True):
        assert rate["rate"] == asked
        assert 0.3 * asked < 2 * rate["requests"] < 2.0 * asked, "in half a second"
        assert rate["failed"] == {}
        assert rate["goodput_share"] == 0.0, "nothing is that quick"
        for times in ("first_token_ms", "between_tokens_ms", "normalized_latency_ms"):
            assert 0 < rate[times]["p50"] <= rate[times]["p90"] <= rate[times]["p99"]
        assert 0 <= rate["lateness_ms"]["p50"] <= rate["lateness_ms"]["max"]
    assert "requests/s ┃ 30 ┃ 60 ┃" in " ".join(done.stdout.split())
    picture = run_here("bench", "plot", tmp_path / "r", "--output", tmp_path / "r.svg")
    assert picture.returncode == 0, picture.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--duration", "3"), "--duration: expected --rate beside it"),
        (("--url", "localhost:1"), "--url: expected --rate beside it"),
        (("--arrivals", "poisson"), "--arrivals: expected --rate beside it"),
        (("--rate", "1", "--concurrency", "4"), "--concurrency: expected none beside --rate"),
        (("--rate", "1", "--requests", "4"), "--requests: expected none beside --rate"),
        (("--rate", "-1"), "--rate: expected a number above 0, got -1"),
        (("--rate", "1", "--ttft-limit", "0"), "--ttft-limit: expected milliseconds above 0, got 0"),
        (("--rate", "1", "--served-model", "a"), "--served-model: expected --url beside it"),
        (("--rate", "1", "--url", "localhost:1", "--set", "seed=1"), "--set: expected none beside --url"),
        (("--rate", "1", "--url", "localhost:1"), "--url localhost:1: "),
        (("--arrivals", "trace"), "--arrivals trace: expected --trace, the file that has them"),
    ],
)
def test_bench_online_names_what_does_not_go_together(model, arguments, message):
    assert_one_line(run_here("bench", "online", "--model", model, *arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", ROOT / "README.md", "--dataset", "lmsys-like"), "--dataset: expected none beside --trace"),
        (("--workload", "1/1:1", "--dataset", "lmsys-like"), "--workload: expected none beside --dataset"),
        (
            ("--workload", "1/1:1", "--workload", "2/2:1", "--breakdown-only"),
            "--breakdown-only: expected one --workload, got 2",
        ),
        (("--breakdown", "--set", "device=cpu"), "--breakdown: expected a GPU, the engine runs on cpu"),
    ],
)
def test_bench_offline_names_what_does_not_go_together(model, arguments, message):
    assert_one_line(run_here("bench", "offline", "--model", model, *arguments), message)


def test_bench_offline_reads_a_trace(model, tmp_path):
    trace = tmp_path / "trace.csv"
    rows = ["2024-01-01 00:00:00.0000000,30,5", "2024-01-01 00:00:01.0000000,0,4", "2024-01-01 00:00:02.0000000,9,2"]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    done = run_here("bench", "offline", "--model", model, "--trace", trace, "--output", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "r").read_text())
    assert (measured["workload"], measured["input_tokens"], measured["output_tokens"]) == ("trace", 39, 7)
    assert (measured["trace_rows_dropped"], measured["trace_rows_too_long"]) == (1, 0)


@pytest.mark.parametrize("bench", ["offline", "online"])
def test_a_bench_looks_at_its_output_before_it_works(tmp_path, bench):
    """There is no model here: a bench that began would say so."""
    for output in ("/dev/full", tmp_path, tmp_path / "no" / "result.json"):
        assert_one_line(run_here("bench", bench, "--model", tmp_path, "--output", output), f"nanoflow: {output}: ")
    done = run_here("bench", bench, "--model", tmp_path, "--output", tmp_path / "result.json")
    assert_one_line(done, "config.json: No such file or directory")
    assert not (tmp_path / "result.json").exists(), "a look leaves nothing"


def test_a_result_that_cannot_be_written_any_more_is_shown(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"No such file or directory; the result is on the standard output"):
        result.write({"tokens": 7}, tmp_path / "gone" / "result.json")
    assert json.loads(capsys.readouterr().out)["tokens"] == 7
