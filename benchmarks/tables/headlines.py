"""The README's table has seven rows: what was measured, in figures, and one sentence that explains it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.tables.result_files import load, load_all, runs_beside_vllm, whole_runs_of_the_search
from benchmarks.tables.result_row import ResultRow, medians


def headlines() -> list[ResultRow]:
    """The rows, as far as their results are there."""
    rows = (_tokens, _beside_vllm, _in_fp8, _overlap, _served, _latency, _soak)
    return [row for make in rows for row in make()]


def _tokens() -> Iterator[ResultRow]:
    if parity := load("parity"):
        done = parity["done"]
        runs, tokens = sum(d["runs"] for d in done), sum(d["rows"] for d in done)
        wrong = sum(d["different_tokens"] for d in done)
        yield ResultRow(
            "**Tokens equal to those of transformers.** Every greedy token of "
            f"{len(done)} small fp32 checkpoints, each run in {runs // len(done)} ways, is compared with "
            "Hugging Face's implementation.",
            f"{wrong} of {tokens:,} tokens differ",
            parity["device"],
        )


def _beside_vllm() -> Iterator[ResultRow]:
    for ours, vllm in runs_beside_vllm():
        rate, peer = ours["total_tokens_per_s"], vllm["total_tokens_per_s"]
        yield ResultRow(
            f"**Offline throughput beside vLLM {vllm['versions']['vllm']}.** {ours['requests']:,} requests of "
            f"{ours['workload']} tokens in and out are there at once for {ours['model']}, on the same card. Eq. 5 of "
            "the paper is the rate at which the model's matrix products alone would keep the GPU busy: their measured "
            "FLOP/s over two per parameter.",
            f"{rate:,.0f} against {peer:,.0f} tokens/s ({rate / peer:.2f}x); {ours['share_of_eq5']:.0%} of Eq. 5",
            ours["gpu"],
        )


def _in_fp8() -> Iterator[ResultRow]:
    for run in load_all("beside_vllm", "*_fp8"):
        told = (
            f"{row['workload']}: {row['nanoflow']['total_tokens_per_s']:,.0f} against "
            f"{row['vllm']['total_tokens_per_s']:,.0f} ({row['ratio']:.2f}x)"
            for row in run["rows"]
        )
        yield ResultRow(
            f"**In FP8 beside vLLM {run['vllm'][0]['versions']['vllm']}.** Weights, activations and KV cache of "
            f"{run['model']} are e4m3 in both engines; lengths are constant, or those of a trace of conversations.",
            f"tokens/s, whole run: {'; '.join(told)}",
            run["gpu"],
        )


def _overlap() -> Iterator[ResultRow]:
    found = []
    for searched, beside in whole_runs_of_the_search():
        steady = [gain for gain in map(_chosen_gain, load_all("search_llama3")) if gain[0] == searched["workload"]]
        if not steady:
            continue
        whole = searched["total_tokens_per_s"] / beside["total_tokens_per_s"]
        best = max(gain for _, gain in steady)
        found.append(f"{searched['workload']}: {best:.3f}x steady, {whole:.3f}x whole run")
    if found:
        yield ResultRow(
            f"**What overlap gains.** The search's plans for {searched['model']} are timed against sequential: in a "
            "steady state of full batches, which they are made for, and over a whole run with its ramp-up, tail and "
            "other mixes, where they can lose.",
            "; ".join(found),
            searched["gpu"],
        )


def _chosen_gain(search: dict[str, Any]) -> tuple[str, float]:
    """The workload of a search, and the gain of the best plan that it chose; 1 where it chose sequential."""
    chosen = [trial["gain"] for trial in search["trials"] if trial["chosen"]]
    return search["trials"][0]["workload"], max(chosen, default=1.0)


def _served() -> Iterator[ResultRow]:
    for run in load_all("served"):
        if "share_of_engine" in run:
            yield ResultRow(
                f"**Behind tritonserver.** {run['clients']} gRPC clients stream the same {run['requests']:,} requests "
                f"({run['model']}, {run['workload']} tokens in and out) that the engine alone had.",
                f"{run['total_tokens_per_s']:,.0f} tokens/s, {run['share_of_engine']:.1%} of the engine alone",
                run["gpu"],
            )


def _latency() -> Iterator[ResultRow]:
    for run in load_all("online"):
        levels = run["levels"]
        yield ResultRow(
            f"**Latency.** {', '.join(str(level['concurrency']) for level in levels)} requests of {run['workload']} "
            f"tokens in and out are in flight on {run['model']}; medians.",
            f"first token {medians(levels, 'first_token_ms')} ms; between tokens "
            f"{medians(levels, 'between_tokens_ms')} ms",
            run["gpu"],
        )


def _soak() -> Iterator[ResultRow]:
    if soak := load("soak"):
        kills, reloads = ([r["event"] for r in soak["rounds"]].count(event) for event in ("kill_engine", "reload"))
        yield ResultRow(
            f"**A soak of {soak['minutes']:g} minutes.** Clients send {soak['overload']:g} times what the server can "
            f"do, cancel and vanish, while the engine is killed {kills} times and the model reloaded {reloads} times; "
            "every request must end once, and nothing may grow.",
            f"{len(soak['failures'])} failures in {soak['requests']:,} requests",
            soak["device"],
        )
