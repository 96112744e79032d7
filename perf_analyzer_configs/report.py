"""What a load test was like for its clients: from profile exports of perf_analyzer to JSON, CSV and a chart.

    python perf_analyzer_configs/report.py results/chat/*.json --slo perf_analyzer_configs/slo/chat.json \\
        --output results/chat/report

The times of a request, all in milliseconds: to its first token (TTFT); between two responses of its stream (ITL; a
response may bring several tokens); per token after the first response (TPOT); in all; and in all per output token
(normalized latency). Goodput is the rate of requests that keep every limit of the SLO.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from chart import chart  # next to this file

PERCENTILES = (50, 90, 95, 99)


class Served(msgspec.Struct, frozen=True):
    """One request as its client saw it. Times in ms since some moment; at each response its new tokens."""

    sent_ms: float
    responses_ms: tuple[float, ...]
    tokens: tuple[int, ...]
    input_tokens: int

    @classmethod
    def of(cls, request: dict[str, Any], origin_ns: int) -> Served:
        """Raises: ValueError when the export lacks what only our inputs ask for."""
        outputs = request["response_outputs"]
        # perf_analyzer writes whatever lay in memory for outputs that a response did not have: take what was asked for.
        for switch in ("return_num_output_tokens", "return_num_input_tokens"):
            if request["request_inputs"].get(switch) is not True:
                raise ValueError(f"a request without {switch}: use inputs of make_inputs.py")
        if not outputs:
            raise ValueError("a request without a response")
        return cls(
            sent_ms=(request["timestamp"] - origin_ns) / 1e6,
            responses_ms=tuple((time - origin_ns) / 1e6 for time in request["response_timestamps"]),
            tokens=tuple(output["num_output_tokens"] for output in outputs),
            input_tokens=outputs[0]["num_input_tokens"],
        )

    @property
    def output_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def time_to_first_token_ms(self) -> float:
        return self.responses_ms[0] - self.sent_ms

    @property
    def inter_token_latencies_ms(self) -> list[float]:
        return [after - before for before, after in zip(self.responses_ms, self.responses_ms[1:], strict=False)]

    @property
    def time_per_output_token_ms(self) -> float:
        """0 where all tokens came at once."""
        later_tokens = self.output_tokens - self.tokens[0]
        return (self.responses_ms[-1] - self.responses_ms[0]) / later_tokens if later_tokens else 0.0

    @property
    def request_latency_ms(self) -> float:
        return self.responses_ms[-1] - self.sent_ms

    @property
    def normalized_latency_ms(self) -> float:
        return self.request_latency_ms / self.output_tokens


TIMES = ("time_to_first_token_ms", "time_per_output_token_ms", "request_latency_ms", "normalized_latency_ms")


def read(export: Path) -> list[tuple[dict[str, Any], list[Served]]]:
    """(its load, its requests) of each experiment in a file of --profile-export-file.

    Raises: ValueError, which names the file, when it is not whole or not of our inputs.
    """
    experiments = []
    try:
        for experiment in json.loads(export.read_text())["experiments"]:
            requests = experiment["requests"]
            origin_ns = min(request["timestamp"] for request in requests)
            load = {"file": export.name, experiment["experiment"]["mode"]: experiment["experiment"]["value"]}
            experiments.append((load, [Served.of(request, origin_ns) for request in requests]))
    except json.JSONDecodeError as error:
        raise ValueError(f"{export}: expected JSON: {error}; perf_analyzer left it unfinished?") from None
    except KeyError as error:
        raise ValueError(f"{export}: expected an export of perf_analyzer, found no {error}") from None
    except ValueError as error:
        raise ValueError(f"{export}: {error}") from None
    return experiments


def summary(requests: Sequence[Served], slo: dict[str, float]) -> dict[str, Any]:
    """Rates over the time from the first request sent to the last response."""
    duration_s = max(request.responses_ms[-1] for request in requests) / 1e3
    result: dict[str, Any] = {
        "requests": len(requests),
        "duration_s": duration_s,
        "requests_per_s": len(requests) / duration_s,
        "input_tokens_per_s": sum(request.input_tokens for request in requests) / duration_s,
        "output_tokens_per_s": sum(request.output_tokens for request in requests) / duration_s,
        "mean_input_tokens": float(np.mean([request.input_tokens for request in requests])),
        "mean_output_tokens": float(np.mean([request.output_tokens for request in requests])),
        "mean_tokens_per_response": float(np.mean([n for request in requests for n in request.tokens])),
    }
    for name in TIMES:
        result[name] = spread([getattr(request, name) for request in requests])
    result["inter_token_latency_ms"] = spread([ms for request in requests for ms in request.inter_token_latencies_ms])
    if slo:
        good = [all(getattr(request, name) <= limit for name, limit in slo.items()) for request in requests]
        result["goodput_requests_per_s"] = sum(good) / duration_s
        result["good_share"] = float(np.mean(good))
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    percentiles = np.percentile(values, PERCENTILES)
    return {
        "mean": float(np.mean(values)),
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, percentiles, strict=True)},
    }


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a_b": 1}"""
    columns = {}
    for name, value in row.items():
        columns.update({f"{name}_{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value})
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("exports", type=Path, nargs="+", help="files that perf_analyzer --profile-export-file wrote")
    parser.add_argument("--slo", type=Path, help=f"JSON of limits, any of {', '.join(TIMES)}")
    parser.add_argument("--output", type=Path, required=True, help="writes OUTPUT.json, OUTPUT.csv and OUTPUT.svg")
    options = parser.parse_args()
    slo = json.loads(options.slo.read_text()) if options.slo else {}
    if unknown := slo.keys() - set(TIMES):
        raise ValueError(f"{options.slo}: unknown {', '.join(sorted(unknown))}; known are {', '.join(TIMES)}")
    rows = [
        {**load, **summary(requests, slo)} for export in options.exports for load, requests in read(export) if requests
    ]
    rows.sort(key=lambda row: row["requests_per_s"])
    table = [flat(row) for row in rows]
    options.output.with_suffix(".json").write_text(json.dumps({"slo": slo, "experiments": rows}, indent=2) + "\n")
    with options.output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in table for column in row)))
        writer.writeheader()
        writer.writerows(table)
    options.output.with_suffix(".svg").write_text(chart(table))
    for row in table:
        goodput = f", goodput {row['goodput_requests_per_s']:.2f} requests/s" if slo else ""
        print(
            f"{row['file']}: {row['requests_per_s']:.2f} requests/s, {row['output_tokens_per_s']:.0f} output tokens/s, "
            f"TTFT p50 {row['time_to_first_token_ms_p50']:.0f} p99 {row['time_to_first_token_ms_p99']:.0f} ms, "
            f"TPOT p50 {row['time_per_output_token_ms_p50']:.1f} ms{goodput}"
        )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
