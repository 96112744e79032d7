"""Three ways to admit requests are simulated with the real scheduler: steps and preemptions, no device.

Results count steps and tokens, so they do not depend on the machine; only wall_s does.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from nanoflow_backend.bench import result
from nanoflow_backend.bench.reservation import ReserveMaxTokens, ReserveNothing
from nanoflow_backend.bench.simulator import EOS, simulate
from nanoflow_backend.bench.trace import Trace, read_trace
from nanoflow_backend.scheduler.forecast.length_forecast import LengthForecast
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler


def main(
    kv_cache_tokens: Annotated[int, typer.Option(help="Tokens that the KV cache holds.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens.")] = None,
    lognormal: Annotated[
        tuple[float, float, float, float] | None,
        typer.Option(help="Mean and deviation of input, then of output tokens; 20,000 requests."),
    ] = None,
    dense_batch_tokens: int = 2048,
    max_running: int = 1024,
    page_tokens: int = 64,
    max_model_tokens: int = 8192,
    max_tokens: Annotated[int, typer.Option(help="That every request asks for.")] = 2048,
    step_s: Annotated[float, typer.Option(help="Time of a step; 0: all requests are there at once.")] = 0.0,
) -> None:
    """Simulate the scheduler with admission by forecast, without reserve, and reserving max_tokens."""
    if (trace is None) == (lognormal is None):
        raise typer.BadParameter("--trace, --lognormal: expected one of both")
    settings = {
        "trace": trace and trace.name,
        "lognormal": lognormal,
        "kv_cache_tokens": kv_cache_tokens,
        "dense_batch_tokens": dense_batch_tokens,
        "max_running": max_running,
        "page_tokens": page_tokens,
        "max_model_tokens": max_model_tokens,
        "max_tokens": max_tokens,
        "step_s": step_s,
    }
    requests = read_trace(trace, max_model_tokens) if trace else lognormal_trace(*lognormal or ())
    limits = SchedulerLimits(
        dense_batch_tokens=dense_batch_tokens,
        chunk_tokens=dense_batch_tokens,
        prompt_tokens=dense_batch_tokens,
        max_running=max_running,
        max_queue_size=len(requests.lengths),
        num_pages=kv_cache_tokens // page_tokens,
        page_tokens=page_tokens,
        max_model_tokens=max_model_tokens,
    )
    arms = {}
    for forecast in (LengthForecast(), ReserveNothing(), ReserveMaxTokens()):
        scheduler = Scheduler(
            limits,
            eos_token_ids=[EOS],
            prefix_caching=False,  # a trace has no text to share
            forecast=forecast,
        )
        outcome = simulate(
            requests,
            scheduler,
            dense_batch_tokens=dense_batch_tokens,
            max_running=max_running,
            max_tokens=max_tokens,
            step_s=(lambda _: step_s) if step_s else None,
        )
        arms[type(forecast).__name__] = asdict(outcome)
        print(type(forecast).__name__, outcome, flush=True)

    workload_facts = {
        "trace_sha256": hashlib.sha256(trace.read_bytes()).hexdigest() if trace else None,
        "dropped_rows": requests.dropped_rows,
        "too_long_rows": requests.too_long_rows,
    }
    result.write({"settings": settings, **workload_facts, "arms": arms}, output)


def lognormal_trace(input_mean: float, input_std: float, output_mean: float, output_std: float) -> Trace:
    """20,000 requests, all there at once, with lengths clipped to 1..4096."""
    rng = np.random.default_rng(0)
    columns = []
    for mean, std in ((input_mean, input_std), (output_mean, output_std)):
        variance = np.log1p((std / mean) ** 2)
        lengths = rng.lognormal(np.log(mean) - variance / 2, np.sqrt(variance), 20_000)
        columns.append(np.clip(lengths.round().astype(int), 1, 4096).tolist())
    return Trace(tuple(zip(*columns, strict=True)), (0.0,) * 20_000)
