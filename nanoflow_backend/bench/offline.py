"""`nanoflow bench offline` measures throughput with all requests queued at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nanoflow_backend.bench import result, workload
from nanoflow_backend.bench.breakdown import break_down
from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.bench.roofs import gemm_flop_per_s, memory_bytes_per_s
from nanoflow_backend.bench.timeline import Counts, Sample, Timeline
from nanoflow_backend.bench.warm_steps import measure_warm_steps
from nanoflow_backend.bench.workload import Dataset, Workload
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.models.model import build
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.gpu_meter import GpuMeter, find_gpu_meter

SHOWN = {
    "wall_s": ("seconds", "{:,.2f}"),
    "total_tokens_per_s": ("tokens/s, prompts and outputs", "{:,.0f}"),
    "output_tokens_per_s": ("output tokens/s", "{:,.0f}"),
    "share_of_eq5": ("share of the optimum (Eq. 5)", "{:.1%}"),
    "dense_batch_fill": ("fill of the batches", "{:.1%}"),
    "kv_use_mean": ("KV cache in use, mean", "{:.1%}"),
    "preemptions": ("preemptions", "{:,}"),
    "mean_power_w": ("power, W", "{:,.0f}"),
    "mj_per_token": ("mJ/token", "{:,.1f}"),
}
SAMPLE_S = 1.0  # between two samples of the timeline
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.percentage:.0f} %"),
    TimeRemainingColumn(),
)


def bench_offline(
    model: Path,
    output: Path | None,
    *,
    input_tokens: int,
    output_tokens: int,
    requests: int,
    trace: Path | None,
    dataset: Dataset | None,
    breakdown: bool,
    breakdown_only: bool,
    settings: Sequence[str],
) -> None:
    """Total and output tokens per second of the whole run, ramp-up and tail included, and of its stationary part.

    With `breakdown_only` there is no whole run: the engine takes up the workload until it is warm, and then a few steps
    are measured and profiled.

    Raises:
        ConfigError: both a trace and a dataset, a breakdown without a GPU, a workload that ends before it, or an output
            that cannot be written.
    """
    if output:
        check_output(output)
    workload.check_source(trace, dataset)
    if breakdown and breakdown_only:
        raise ConfigError("--breakdown: expected none beside --breakdown-only")
    engine = make_engine(model, settings, max_queue_size=str(requests))
    option = "--breakdown-only" if breakdown_only else "--breakdown"
    if (breakdown or breakdown_only) and engine.config.device != "cuda":
        raise ConfigError(f"{option}: expected a GPU, the engine runs on {engine.executor.device.name}")
    meter = find_gpu_meter()
    if breakdown_only and meter is None:
        raise ConfigError(f"{option}: expected nvidia-ml-py, which measures the GPU")
    work = workload.choose(input_tokens, output_tokens, requests, trace, dataset, engine.max_model_tokens)
    queue_all(engine, work)
    facts = {"workload": work.name, **work.facts, **result.engine_facts(engine)}
    if breakdown_only and meter is not None:
        measured = {**facts, **measure_warm_steps(engine, meter)}
    else:
        run = OfflineRun(engine, work, breakdown, meter)
        run.to_the_end()
        measured = {**facts, **run.measured()}
        _show(measured)
    if output or breakdown_only:
        result.write(measured, output)
    engine.close()


def queue_all(engine: Engine, work: Workload) -> None:
    """Add all requests of a workload: greedy, each of its own length."""
    for number, (prompt, (_, output_tokens)) in enumerate(
        zip(work.prompts(engine.model_config.vocab_size), work.lengths, strict=True)
    ):
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        engine.add(Request(number, prompt, params))


def _show(measured: dict[str, Any]) -> None:
    """The figures that people ask for, of the whole run and of its stationary part. The result has all of them."""
    steady = measured["steady"]
    parts = {"whole run": measured, **({"steady": steady} if isinstance(steady, dict) else {})}
    table = Table("", *parts, title=f"{measured['requests']} requests of {measured['workload']}, {measured['model']}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, (label, form) in SHOWN.items():
        if name in measured:
            table.add_row(label, *(form.format(part[name]) for part in parts.values()))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"on {measured['engine_is']}", markup=False, soft_wrap=True)
    if isinstance(steady, str):
        console.print(f"steady part: {steady}", markup=False, soft_wrap=True)


class OfflineRun:
    """One workload, whose requests are queued, through one engine; measures as it goes.

    `with_breakdown` profiles a few steps when the queue has just become empty: the mix is still that of a full engine,
    and the stationary part is over.
    """

    def __init__(self, engine: Engine, work: Workload, with_breakdown: bool, meter: GpuMeter | None) -> None:
        self.engine, self.work = engine, work
        self._meter = meter
        self._counts, self._outputs, self._peak_pages = Counts(), 0, 0
        self._breakdown_is_due = with_breakdown
        self._breakdown: dict[str, Any] | None = None

    def to_the_end(self) -> None:
        """Step until every request has ended."""
        self._samples, start_cpu_s = [self._sample()], time.thread_time()
        with Progress(*COLUMNS, console=Console(stderr=True)) as progress:
            task = progress.add_task("output tokens", total=self.work.output_tokens)
            while self.engine.has_work:
                self._step()
                if time.perf_counter() - self._samples[-1].time_s >= SAMPLE_S:
                    self._samples.append(self._sample())
                    progress.update(task, completed=self._outputs)
                if self._breakdown_is_due and not self.engine.scheduler.stats.waiting_requests:
                    self._breakdown_is_due = False
                    self._breakdown = break_down(self.engine, self._step)
        self._samples.append(self._sample())
        self._cpu_s = time.thread_time() - start_cpu_s

    def measured(self) -> dict[str, Any]:
        """Also measures what the device can do at all, with the engine still in place."""
        engine, ranks = self.engine, self.engine.config.tensor_parallel
        timeline = Timeline(self._samples, engine.config.dense_batch_tokens)
        model, precision = build(engine.model_config, ranks), engine.config.precision
        work = ModelWork.of(model, engine.model_config, precision)
        device = engine.config.device
        gemm = gemm_flop_per_s(model, engine.model_config, engine.config.dense_batch_tokens, precision, device)
        optimum = gemm.per_s / (2 * work.parameters)  # the paper's Eq. 5, of one device

        def rates(part: Timeline, tokens: int) -> dict[str, Any]:
            found = part.rates(tokens)
            a_device = found["total_tokens_per_s"] / ranks
            return found | {"tokens_per_s_per_device": round(a_device, 1), "share_of_eq5": round(a_device / optimum, 4)}

        steady: Timeline | str | dict[str, Any] = timeline.steady()
        if isinstance(steady, Timeline):
            from_s = steady.samples[0].time_s - timeline.samples[0].time_s
            steady = {"from_s": round(from_s, 2), **rates(steady, steady.counts.tokens)}
        return {
            "requests": len(self.work.lengths),
            "input_tokens": self.work.input_tokens,
            **rates(timeline, self.work.input_tokens + self._outputs),
            "engine_thread_cpu_ms_per_step": round(1e3 * self._cpu_s / self._counts.steps, 3),
            "prefix_hit_tokens": engine.scheduler.stats.prefix_hit_tokens,
            "steady": steady,
            "eq5_tokens_per_s_per_device": round(optimum, 1),
            "gemm": msgspec.to_builtins(gemm),
            "memory": msgspec.to_builtins(memory_bytes_per_s(device)),
            "work": msgspec.to_builtins(work),
            "breakdown": self._breakdown,
            "timeline": timeline.points(),
        }

    def _step(self) -> None:
        self._outputs += sum(len(delta.token_ids) for delta in self.engine.step())
        used_pages = self.engine.scheduler.stats.used_pages
        self._peak_pages = max(self._peak_pages, used_pages)
        if self.engine.last_batch:
            self._counts.add(self.engine.last_batch, used_pages)

    def _sample(self) -> Sample:
        gpu = self._meter.read() if self._meter else None
        peak_pages, self._peak_pages = self._peak_pages, 0
        stats, counts = self.engine.scheduler.stats, replace(self._counts)
        return Sample(time.perf_counter(), counts, self._outputs, peak_pages, stats, gpu)
