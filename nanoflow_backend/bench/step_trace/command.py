"""bench_trace is `nanoflow trace`: it brings an engine to the steps that are wanted, and traces them into a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from nanoflow_backend.bench import result
from nanoflow_backend.bench.offline_run import queue_all
from nanoflow_backend.bench.step_trace.launch_times import LAPS, ClockedLaunches, LaunchTimes, RecordedLaunches
from nanoflow_backend.bench.step_trace.trace_file import summary, trace_events
from nanoflow_backend.bench.step_trace.traced_steps import WorkEndedError, run_steps, trace_steps
from nanoflow_backend.bench.workload import WorkloadSpec
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine
from nanoflow_backend.engine.local_executor import LocalExecutor
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Delta
from nanoflow_backend.text.text_stream import TextStream

Begin = Literal["start", "decodes"]


def bench_trace(
    model: Path,
    output: Path,
    *,
    spec: WorkloadSpec,
    steps: int,
    begin: Begin,
    skip_steps: int,
    settings: Sequence[str],
) -> None:
    """Queue a workload, step to where it is to begin and `skip_steps` further, and trace `steps` steps.

    As many steps right before them run untraced: `untraced_step_ms` says what tracing costs.

    Raises:
        ConfigError: a workload that ends before, CUDA graphs on several ranks, or an output that cannot be written.
    """
    check_output(output)
    engine = make_engine(model, settings, max_queue_size=str(spec.requests))
    try:
        executor = engine.executor
        assert isinstance(executor, LocalExecutor)
        work = spec.read(engine.max_model_tokens)
        times = launch_times(engine, executor)
        queue_all(engine, work)
        take = detokeniser(engine)
        try:
            go_to(engine, begin, skip_steps)
            start_s = time.perf_counter()
            run_steps(engine, steps, lambda _: take(engine.step()))
            untraced_s = time.perf_counter() - start_s
            traced = trace_steps(engine, executor.worker, times, steps, take)
        except WorkEndedError as early:
            raise ConfigError(f"--requests {len(work.lengths)} of {work.name} tokens: {early}") from None
        layers, device = engine.model_config.num_layers, executor.device
        found = {"untraced_step_ms": round(1e3 * untraced_s / steps, 4), **summary(traced, layers)}
        facts = {"workload": work.name, **work.facts, **result.engine_facts(engine), "times": times.how, **found}
        events = trace_events(traced, layers, device.name, device.sms)
        result.write({**facts, "displayTimeUnit": "ms", "traceEvents": events}, output)
    finally:
        engine.close()
    _show(facts, output)


def launch_times(engine: Engine, executor: LocalExecutor) -> LaunchTimes:
    """What times the launches of rank 0. Captures every CUDA graph once for each lap, while no request has pages.

    Raises:
        ConfigError: CUDA graphs on several ranks: a capture runs collectives, and the others would not.
    """
    config = engine.config
    if config.device != "cuda":
        return ClockedLaunches()
    times = RecordedLaunches(config.cuda_graphs)
    if config.cuda_graphs:
        if config.tensor_parallel > 1:
            raise ConfigError(
                f"cuda_graphs: expected false in a trace with tensor_parallel {config.tensor_parallel}: "
                "--set cuda_graphs=false"
            )
        executor.worker.program.watch(times)
        for lap in range(LAPS):
            times.lap = lap
            executor.worker.warm_up()
        executor.worker.program.watch(None)
    return times


def go_to(engine: Engine, begin: Begin, skip_steps: int) -> None:
    """To the first step ("start"), or behind the first in which nothing but decodes ran; then some steps further.

    Raises:
        WorkEndedError: before that.
    """
    while begin == "decodes" and (engine.last_batch is None or engine.last_batch.prefills):
        if not engine.has_work:
            raise WorkEndedError("expected a step of decodes alone, there was none: fewer requests may fit at once")
        engine.step()
    run_steps(engine, skip_steps, lambda _: engine.step())


def detokeniser(engine: Engine) -> Callable[[list[Delta]], object]:
    """Turns deltas into text as LLM does, where the model has a tokenizer; the server's stub does so in its process."""
    streams: dict[int, TextStream] = {}
    params = SamplingParams(ignore_eos=True)

    def take(deltas: list[Delta]) -> None:
        for delta in deltas:
            if delta.request_id not in streams:
                streams[delta.request_id] = TextStream(engine.tokenizer, params, [])
            streams[delta.request_id].push(delta)

    return take


def _show(facts: dict[str, Any], output: Path) -> None:
    console, parts = Console(highlight=False), {"device": "operations", "host, without what lies within": "host"}
    for title, name in parts.items():
        table = Table(title, "ms a step")
        table.columns[1].justify = "right"
        for row, ms in facts[f"{name}_ms_per_step"].items():
            table.add_row(row, f"{ms:,.3f}")
        console.print(table)
    console.print(f"a step: {facts['step_ms']:,.3f} ms, {facts['untraced_step_ms']:,.3f} ms untraced")
    console.print(f"times: {facts['times']}", soft_wrap=True)
    console.print(f"open {output} in https://ui.perfetto.dev or chrome://tracing", soft_wrap=True)
