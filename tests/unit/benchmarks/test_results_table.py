"""The tables of README and docs/results.md are those that benchmarks/results makes."""

import json
import re

import pytest
import typer

from benchmarks.tables import result_files, results_table
from benchmarks.tables.full_table import groups
from benchmarks.tables.headlines import headlines

OFFLINE = {
    "requests": 1500,
    "workload": "1024/512",
    "model": "llama-3-8b",
    "total_tokens_per_s": 30_000.0,
    "share_of_eq5": 0.7,
    "gpu": "NVIDIA H200",
}
VLLM = {"versions": {"vllm": "0.26.0"}, "total_tokens_per_s": 24_000.0}


def test_the_tables_are_those_that_the_results_make():
    results_table.main(check=True)


@pytest.mark.parametrize("name", ["README", "FULL"])
def test_a_figure_that_no_result_has_is_found(name, tmp_path, monkeypatch):
    stale = tmp_path / "stale.md"
    text = getattr(results_table, name).read_text()
    assert "0 of 1,907,712 tokens differ" in text
    stale.write_text(text.replace("0 of 1,907,712 tokens differ", "0 of 2,000,000 tokens differ"))
    monkeypatch.setattr(results_table, name, stale)
    monkeypatch.setattr(results_table, "ROOT", tmp_path)
    with pytest.raises(typer.Exit) as stopped:
        results_table.main(check=True)
    assert stopped.value.exit_code == 1


def test_every_figure_of_the_readme_is_of_the_full_table():
    full = " ".join(" ".join(row) for rows in groups().values() for row in rows)
    measured = [row.measured for row in headlines() if "whole run" not in row.measured]  # whose ratio is of two rows
    figures = [figure for text in measured for figure in re.findall(r"\d[\d,.]*\d", text)]
    assert len(figures) >= 10
    assert [figure for figure in figures if figure not in full] == []


def test_a_file_without_markers_is_named():
    with pytest.raises(ValueError, match="expected the lines <!-- measured"):
        results_table.between_markers("# Results\n", "")


def test_the_row_beside_vllm_comes_with_both_runs_of_one_name(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    (tmp_path / "peer_vllm_m_1024_512.json").write_text(json.dumps(VLLM))
    assert headlines() == []
    (tmp_path / "offline_beside_vllm_m_1024_512.json").write_text(json.dumps(OFFLINE))
    (row,) = headlines()
    assert row.measured == "30,000 against 24,000 tokens/s (1.25x); 70% of Eq. 5"
    assert "vLLM 0.26.0" in row.what
    assert row.hardware == "NVIDIA H200"


def test_a_result_of_both_engines_has_a_row_for_each_workload(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    figures = {"mean_power_w": 680.4, "mj_per_token": 15.26}
    rows = [
        {
            "workload": workload,
            "requests": 1500,
            "ratio": ratio,
            "nanoflow": {"total_tokens_per_s": 40_000.0 * ratio, "share_of_eq5": 0.61, **figures},
            "vllm": {"total_tokens_per_s": 40_000.0, **figures},
        }
        for workload, ratio in (("1024/512", 1.1), ("512/1024", 1.2))
    ]
    run = {
        "model": "m",
        "gpu": "NVIDIA H200",
        "nanoflow": {"quantization": {"method": "fp8"}, "kv_cache_dtype": "fp8_e4m3"},
        "vllm": [{"versions": {"vllm": "0.26.0"}}],
        "rows": rows,
    }
    (tmp_path / "beside_vllm_m_fp8.json").write_text(json.dumps(run))
    first, second = groups()["Throughput of the engine"]
    assert first.what == "vLLM 0.26.0, weights in FP8, KV cache in FP8, 1,500 requests of 1024/512, m: whole run"
    assert first.measured == (
        "40,000 tokens/s; 680 W, 15.3 mJ a token; NanoFlow, on the same card: "
        "44,000 tokens/s; 680 W, 15.3 mJ a token; 61% of Eq. 5 (1.10x)"
    )
    assert "512/1024" in second.what


def test_gains_are_told_with_the_whole_run_that_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    for name, rate in (("searched", 95.0), ("beside_searched", 100.0)):
        run = {"workload": "512/1024", "total_tokens_per_s": rate, "model": "m", "gpu": "NVIDIA H200"}
        (tmp_path / f"ablation_m_512_1024_{name}.json").write_text(json.dumps(run))
    trials = [{"workload": "512/1024", "gain": gain, "chosen": gain > 1} for gain in (1.0, 1.1)]
    (tmp_path / "search_llama3_m.json").write_text(json.dumps({"trials": trials}))
    (row,) = headlines()
    assert row.measured == "512/1024: 1.100x steady, 0.950x whole run"


def test_a_row_of_an_open_loop_has_each_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "RESULTS", tmp_path)
    times = {"mean": 12.0, "p50": 11.0, "p90": 13.0, "p99": 14.04}
    fields = dict.fromkeys(("first_token_ms", "between_tokens_ms", "normalized_latency_ms"), times)
    none = {"first_token_ms": {}, "between_tokens_ms": {}, "normalized_latency_ms": {}}
    rates = [
        {"rate": 8.0, **fields, "goodput_per_s": 7.5},
        {"rate": 16.5, **none, "goodput_per_s": 0.0},
    ]
    about = {"engine": "vllm", "arrivals": "Poisson, seed 0", "model": "m", "workload": "9/9", "gpu": "a GPU"}
    (tmp_path / "open_loop_vllm.json").write_text(json.dumps({**about, "slo": {"first_token_ms": 1.0}, "rates": rates}))
    (row,) = groups()["Latency"]
    assert row.what.startswith("Latency of vllm at 8 / 16.5 requests a second (Poisson, seed 0), m ")
    assert row.measured == (
        "normalized latency 12.0 / - ms a token (means); p99 of the first token 14.0 / - ms, between tokens "
        "14.0 / - ms; goodput 7.5 / 0.0 requests/s"
    )
