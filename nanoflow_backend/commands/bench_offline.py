"""nanoflow bench offline: throughput with all requests queued at once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanoflow_backend.commands import result
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.scheduler.request import Request
from nanoflow_backend.scheduler.trace import read_trace

SEED = 0


def bench_offline(
    model: Path,
    output: Path | None,
    input_tokens: int,
    output_tokens: int,
    requests: int,
    trace: Path | None,
    settings: Sequence[str],
) -> None:
    """Total and output tokens per second of the whole run, ramp-up and tail included. Tokens are counted as they
    are processed; prompts are random ids, so that prefixes are not shared."""
    engine = make_engine(model, settings, max_waiting=str(max(requests, 1)))
    if trace is None:
        workload: dict[str, Any] = {"workload": f"{input_tokens}/{output_tokens}"}
        lengths = ((input_tokens, output_tokens),) * requests
    else:
        read = read_trace(trace, engine.max_model_tokens)
        workload = {
            "workload": trace.stem,
            "trace_rows_dropped": read.dropped_rows,
            "trace_rows_clipped": read.clipped_rows,
        }
        lengths = read.lengths[:requests]
    measured = measure(engine, lengths)
    engine.close()
    result.write({**workload, "engine": "nanoflow", "schedule": engine.config.schedule, **measured}, output)


def measure(engine: Engine, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    draw = random.Random(SEED)
    vocab_size = engine.model_config.vocab_size
    for number, (input_tokens, output_tokens) in enumerate(lengths):
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        engine.add(Request(number, draw.choices(range(vocab_size), k=input_tokens), params))
    total_input, total_output = (sum(tokens) for tokens in zip(*lengths, strict=True))
    outputs = steps = 0
    start, start_cpu = time.perf_counter(), time.thread_time()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("output tokens", total=total_output)
        while engine.has_work:
            new = sum(len(delta.token_ids) for delta in engine.step())
            outputs, steps = outputs + new, steps + 1
            progress.advance(task, new)
    wall_s, cpu_s = time.perf_counter() - start, time.thread_time() - start_cpu
    stats = engine.scheduler.stats
    processed = total_input - stats.prefix_hit_tokens + outputs
    return {
        "requests": len(lengths),
        "input_tokens": total_input,
        "output_tokens": outputs,
        "wall_s": round(wall_s, 3),
        "total_tokens_per_s": round((total_input + outputs) / wall_s, 1),
        "output_tokens_per_s": round(outputs / wall_s, 1),
        "steps": steps,
        "dense_batch_fill": round(processed / (steps * engine.config.dense_batch_tokens), 4),
        "engine_thread_cpu_ms_per_step": round(1e3 * cpu_s / steps, 3),
        "preemptions": stats.preemptions,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
    }
