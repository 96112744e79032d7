"""Write the README's table of measurements from benchmarks/results.

python benchmarks/readme_table.py            # --check: fail if the README has another one
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN = "<!-- measured: written by benchmarks/readme_table.py from benchmarks/results -->\n"
END = "<!-- end of measured -->"


def rows() -> Iterator[tuple[str, str, str]]:
    """(what, measured, where) of each result that there is."""
    if parity := load("parity"):
        done = parity["done"]
        runs, tokens = sum(d["runs"] for d in done), sum(d["rows"] for d in done)
        worst = max(d["worst_logits_relative_rms"] for d in done)
        wrong = sum(d["different_tokens"] for d in done)
        yield (
            f"Greedy tokens against transformers, fp32: {len(done)} of {parity['of_checkpoints']} checkpoints, "
            f"{runs // len(done)} ways to run each",
            f"{wrong} of {tokens:,} tokens differ; worst logits error {worst:.1e} relative RMS",
            parity["device"],
        )
    if loop := load("engine_loop"):
        yield (
            f"CPU time of the engine's thread a step, {loop['running_requests']:,} requests decoding, no device",
            f"{loop['total_ms_per_step']:.2f} ms (p99 {loop['p99_step_ms']:.2f})",
            loop["device"],
        )
    if simulated := load("scheduler_sim_conv_300k"):
        forecast, naive = simulated["arms"]["LengthForecast"], simulated["arms"]["ReserveNothing"]
        reserve = simulated["arms"]["ReserveMaxTokens"]
        yield (
            f"Azure conversation trace, {forecast['requests']:,} requests, KV for 300k tokens: steps and preemptions "
            "with admission by forecast / without / reserving max_tokens",
            " / ".join(f"{arm['steps']:,} and {arm['preemptions']}" for arm in (forecast, naive, reserve)),
            "simulated, no device",
        )
    for path in sorted(RESULTS.glob("offline_*.json")):
        run = json.loads(path.read_text())
        yield (
            f"Offline, {run['model']} with random weights, {run['workload']} tokens in and out, "
            f"{run['requests']:,} requests at once, schedule {run['schedule']}: whole run",
            f"{run['total_tokens_per_s']:,.0f} tokens/s; {run['mean_power_w']:.0f} W, "
            f"{run['mj_per_token']:.1f} mJ a token",
            run["gpu"],
        )
    if served := load("serving"):
        yield (
            f"{served['streams']} gRPC streams of the demo model through tritonserver against the engine alone",
            f"{served['served_tokens_per_s']:,.0f} against {served['engine_tokens_per_s']:,.0f} output tokens/s",
            served["device"],
        )


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def readme() -> str:
    """The README with the table that the results make."""
    lines = ["| what | measured | on |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows())]
    before, _, rest = README.read_text().partition(BEGIN)
    return before + BEGIN + "\n".join(lines) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(readme() != README.read_text())
    README.write_text(readme())
