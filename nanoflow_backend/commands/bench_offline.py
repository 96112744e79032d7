"""nanoflow bench offline: throughput with all requests queued at once."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanoflow_backend.commands import result
from nanoflow_backend.commands.gpu_meter import GpuReading, find_gpu_meter
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.scheduler.request import Request
from nanoflow_backend.scheduler.trace import read_trace

SEED = 0
SAMPLE_S = 1.0  # between two samples of the timeline
GENERATIONS = 2  # the mix is stationary when each slot has had so many requests


def bench_offline(
    model: Path,
    output: Path | None,
    input_tokens: int,
    output_tokens: int,
    requests: int,
    trace: Path | None,
    settings: Sequence[str],
) -> None:
    """Total and output tokens per second of the whole run, ramp-up and tail included, and of its stationary part.
    Tokens are counted as they are processed; prompts are random ids, so that prefixes are not shared."""
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
    described = {
        "model": model.name,
        "engine": "nanoflow",
        "engine_is": engine.description,
        "schedule": engine.config.schedule,
    }
    result.write({**workload, **described, **measured}, output)


@dataclass(frozen=True)
class Sample:
    """A moment of a run. `tokens` are those launched since the start; what a preemption computes again counts again."""

    time_s: float
    tokens: int
    output_tokens: int
    finished: int
    running: int
    waiting: int
    used_pages: int
    gpu: GpuReading | None


def measure(engine: Engine, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    draw = random.Random(SEED)
    vocab_size = engine.model_config.vocab_size
    for number, (input_tokens, output_tokens) in enumerate(lengths):
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        engine.add(Request(number, draw.choices(range(vocab_size), k=input_tokens), params))
    total_input, total_output = (sum(tokens) for tokens in zip(*lengths, strict=True))
    meter, outputs, steps = find_gpu_meter(), 0, 0

    def sample() -> Sample:
        stats = engine.scheduler.stats
        gpu = meter.read() if meter else None
        finished, running, waiting = stats.finished_requests, stats.running_requests, stats.waiting_requests
        moment = time.perf_counter()
        return Sample(moment, engine.launched_tokens, outputs, finished, running, waiting, stats.used_pages, gpu)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    timeline, start_cpu = [sample()], time.thread_time()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("output tokens", total=total_output)
        while engine.has_work:
            new = sum(len(delta.token_ids) for delta in engine.step())
            outputs, steps = outputs + new, steps + 1
            if time.perf_counter() - timeline[-1].time_s >= SAMPLE_S:
                timeline.append(sample())
                progress.update(task, completed=outputs)
    timeline.append(sample())
    cpu_s, stats = time.thread_time() - start_cpu, engine.scheduler.stats
    steady = stationary(timeline)
    return {
        "requests": len(lengths),
        "input_tokens": total_input,
        **rates(timeline, total_input + outputs),
        "steps": steps,
        "dense_batch_fill": round(timeline[-1].tokens / (steps * engine.config.dense_batch_tokens), 4),
        "engine_thread_cpu_ms_per_step": round(1e3 * cpu_s / steps, 3),
        "preemptions": stats.preemptions,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "steady": rates(steady, steady[-1].tokens - steady[0].tokens) if len(steady) > 1 else None,
        "timeline": [moment(before, after, timeline[0].time_s) for before, after in pairwise(timeline)],
    }


def stationary(timeline: Sequence[Sample]) -> list[Sample]:
    """The samples after GENERATIONS of requests and before the queue was empty."""
    most_running = max(sample.running for sample in timeline)
    return [sample for sample in timeline if sample.finished >= GENERATIONS * most_running and sample.waiting]


def rates(timeline: Sequence[Sample], tokens: int) -> dict[str, Any]:
    """From the first of these samples to the last, in which `tokens` were processed."""
    first, last = timeline[0], timeline[-1]
    wall_s = last.time_s - first.time_s
    outputs = last.output_tokens - first.output_tokens
    found = {
        "wall_s": round(wall_s, 3),
        "output_tokens": outputs,
        "total_tokens_per_s": round(tokens / wall_s, 1),
        "output_tokens_per_s": round(outputs / wall_s, 1),
    }
    if first.gpu and last.gpu:
        energy_j = last.gpu.energy_j - first.gpu.energy_j
        found["mean_power_w"] = round(energy_j / (last.gpu.time_s - first.gpu.time_s), 1)
        found["mj_per_token"] = round(1e3 * energy_j / tokens, 3)
        found["mean_sm_clock_mhz"] = round(sum(s.gpu.sm_clock_mhz for s in timeline if s.gpu) / len(timeline))
    return found


def moment(before: Sample, after: Sample, start_s: float) -> dict[str, Any]:
    """One point of the timeline."""
    found = {
        "at_s": round(after.time_s - start_s, 2),
        "total_tokens_per_s": round((after.tokens - before.tokens) / (after.time_s - before.time_s)),
        "running": after.running,
        "used_pages": after.used_pages,
    }
    if before.gpu and after.gpu:
        seconds = after.gpu.time_s - before.gpu.time_s
        found["power_w"] = round((after.gpu.energy_j - before.gpu.energy_j) / seconds)
        found |= after.gpu._asdict()
        del found["time_s"], found["energy_j"]
    return found
