"""Simulate the scheduler over a trace with three ways to admit, and write benchmarks/results/scheduler_sim_NAME.json.

    python benchmarks/scheduler_sim.py --trace AzureLLMInferenceTrace_conv.csv --cache-tokens 900000

Results count steps and tokens, so they do not depend on the machine; only wall_s does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np

from nanoflow_backend.scheduler.forecast import LengthForecast, ReserveMaxTokens, ReserveNothing
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.simulator import EOS, simulate
from nanoflow_backend.scheduler.trace import read_azure_trace

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--cache-tokens", type=int, required=True, help="tokens that the KV cache holds")
    parser.add_argument("--dense-batch-tokens", type=int, default=2048)
    parser.add_argument("--max-running", type=int, default=1024)
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--context-tokens", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=2048, help="that every request asks for")
    parser.add_argument("--step-s", type=float, default=0.0, help="time of a step; 0: all requests are there at once")
    parser.add_argument("--name", required=True, help="of the result file")
    options = parser.parse_args()

    trace = read_azure_trace(options.trace, options.context_tokens)
    arms = {}
    for forecast in (LengthForecast(), ReserveNothing(), ReserveMaxTokens()):
        scheduler = Scheduler(
            dense_batch_tokens=options.dense_batch_tokens,
            chunk_tokens=options.dense_batch_tokens,
            max_running=options.max_running,
            max_waiting=len(trace.requests),
            num_pages=options.cache_tokens // options.page_tokens,
            page_tokens=options.page_tokens,
            max_model_tokens=options.context_tokens + 1,
            eos_token_ids=[EOS],
            prefix_caching=False,  # a trace has no text to share
            forecast=forecast,
        )
        result = simulate(
            trace.requests,
            scheduler,
            dense_batch_tokens=options.dense_batch_tokens,
            max_running=options.max_running,
            max_tokens=options.max_tokens,
            step_s=options.step_s,
        )
        arms[type(forecast).__name__] = asdict(result)
        print(type(forecast).__name__, result, flush=True)

    settings = {name: value for name, value in vars(options).items() if name not in ("trace", "name")}
    header = {
        "command": "python benchmarks/scheduler_sim.py "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        + f" --trace {options.trace.name} --name {options.name}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "msgspec": msgspec.__version__},
        "machine": "2-core x86-64, no GPU",
        "trace_sha256": hashlib.sha256(options.trace.read_bytes()).hexdigest(),
        "dropped_rows": trace.dropped_rows,
        "clipped_rows": trace.clipped_rows,
    }
    path = RESULTS / f"scheduler_sim_{options.name}.json"
    path.write_text(json.dumps({"header": header, "settings": settings, "arms": arms}, indent=2) + "\n")
    print("written:", path)


if __name__ == "__main__":
    main()
