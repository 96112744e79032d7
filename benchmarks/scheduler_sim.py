"""Simulate the scheduler with three ways to admit, and write benchmarks/results/scheduler_sim_NAME.json.

    python benchmarks/scheduler_sim.py --trace AzureLLMInferenceTrace_conv.csv --cache-tokens 900000 --name conv_900k
    python benchmarks/scheduler_sim.py --lognormal 100 50 1000 700 --cache-tokens 400000 --max-tokens 4096 --name long

Results count steps and tokens, so they do not depend on the machine; only wall_s does.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from nanoflow_backend.bench import result
from nanoflow_backend.bench.reservation import ReserveMaxTokens, ReserveNothing
from nanoflow_backend.bench.simulator import EOS, simulate
from nanoflow_backend.bench.trace import Trace, read_trace
from nanoflow_backend.scheduler.length_forecast import LengthForecast
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload = parser.add_mutually_exclusive_group(required=True)
    workload.add_argument("--trace", type=Path, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    workload.add_argument(
        "--lognormal", type=float, nargs=4, help="mean and deviation of input, then of output tokens; 20,000 requests"
    )
    parser.add_argument("--cache-tokens", type=int, required=True, help="tokens that the KV cache holds")
    parser.add_argument("--dense-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-running", type=int, default=1024)
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--max-model-tokens", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=2048, help="that every request asks for")
    parser.add_argument("--step-s", type=float, default=0.0, help="time of a step; 0: all requests are there at once")
    parser.add_argument("--name", required=True, help="of the result file")
    options = parser.parse_args()

    trace = read_trace(options.trace, options.max_model_tokens) if options.trace else lognormal(*options.lognormal)
    arms = {}
    for forecast in (LengthForecast(), ReserveNothing(), ReserveMaxTokens()):
        limits = SchedulerLimits(
            dense_batch_tokens=options.dense_batch_tokens,
            chunk_tokens=options.dense_batch_tokens,
            prompt_tokens=options.dense_batch_tokens,
            max_running=options.max_running,
            max_queue_size=len(trace.lengths),
            num_pages=options.cache_tokens // options.page_tokens,
            page_tokens=options.page_tokens,
            max_model_tokens=options.max_model_tokens,
        )
        scheduler = Scheduler(
            limits,
            eos_token_ids=[EOS],
            prefix_caching=False,  # a trace has no text to share
            forecast=forecast,
        )
        outcome = simulate(
            trace,
            scheduler,
            dense_batch_tokens=options.dense_batch_tokens,
            max_running=options.max_running,
            max_tokens=options.max_tokens,
            step_s=(lambda _: options.step_s) if options.step_s else None,
        )
        arms[type(forecast).__name__] = asdict(outcome)
        print(type(forecast).__name__, outcome, flush=True)

    settings = vars(options) | {"trace": options.trace and options.trace.name}
    workload_facts = {
        "trace_sha256": hashlib.sha256(options.trace.read_bytes()).hexdigest() if options.trace else None,
        "dropped_rows": trace.dropped_rows,
        "too_long_rows": trace.too_long_rows,
    }
    path = RESULTS / f"scheduler_sim_{options.name}.json"
    result.write({"settings": settings, **workload_facts, "arms": arms}, path)
    print("written:", path)


def lognormal(input_mean: float, input_std: float, output_mean: float, output_std: float) -> Trace:
    """20,000 requests, all there at once, with lengths clipped to 1..4096."""
    rng = np.random.default_rng(0)
    columns = []
    for mean, std in ((input_mean, input_std), (output_mean, output_std)):
        variance = np.log1p((std / mean) ** 2)
        lengths = rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), 20_000)
        columns.append(np.clip(lengths.round().astype(int), 1, 4096).tolist())
    return Trace(tuple(zip(*columns, strict=True)), (0.0,) * 20_000)


if __name__ == "__main__":
    main()
