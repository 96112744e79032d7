"""OfflineRun takes one workload through an engine, whose requests are all queued, and measures as it goes."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanoflow_backend.bench.breakdown import break_down
from nanoflow_backend.bench.timeline import Counts, Sample, Timeline
from nanoflow_backend.bench.workload import SEED, Workload
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.gpu_meter import GpuMeter

SAMPLE_S = 1.0  # between two samples of the timeline
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.percentage:.0f} %"),
    TimeRemainingColumn(),
)


def queue_all(engine: Engine, work: Workload, seed: int = SEED) -> None:
    """Add all requests of a workload: greedy, each of its own length."""
    for number, (prompt, (_, output_tokens)) in enumerate(
        zip(work.prompts(engine.model_config.vocab_size, seed), work.lengths, strict=True)
    ):
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
        engine.add(Request(number, prompt, params))


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

    def measured(self, optimum: float) -> dict[str, Any]:
        """What a result has of a run; `optimum` is Eq. 5's, in tokens/s of one device."""
        ranks = self.engine.config.tensor_parallel
        timeline = Timeline(self._samples, self.engine.config.dense_batch_tokens)

        def rates(part: Timeline, tokens: int) -> dict[str, Any]:
            found = part.rates(tokens)
            a_device = found["total_tokens_per_s"] / ranks
            return found | {"tokens_per_s_per_device": round(a_device, 1), "share_of_eq5": round(a_device / optimum, 4)}

        steady: Timeline | str | dict[str, Any] = timeline.steady()
        if isinstance(steady, Timeline):
            from_s = steady.samples[0].time_s - timeline.samples[0].time_s
            steady = {"from_s": round(from_s, 2), **rates(steady, steady.counts.tokens)}
        first, last = self._samples[0].stats, self._samples[-1].stats
        return {
            "workload": self.work.name,
            **self.work.facts,
            "requests": len(self.work.lengths),
            "input_tokens": self.work.input_tokens,
            **rates(timeline, self.work.input_tokens + self._outputs),
            "engine_thread_cpu_ms_per_step": round(1e3 * self._cpu_s / self._counts.steps, 3),
            "prefix_hit_tokens": last.prefix_hit_tokens - first.prefix_hit_tokens,
            "steady": steady,
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
