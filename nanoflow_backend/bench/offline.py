"""`nanoflow bench offline` measures throughput with all requests queued at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from nanoflow_backend.bench import result
from nanoflow_backend.bench.emulation import Emulation
from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.bench.offline_run import OfflineRun, queue_all
from nanoflow_backend.bench.roofs import gemm_flop_per_s, memory_bytes_per_s
from nanoflow_backend.bench.warm_steps import measure_warm_steps
from nanoflow_backend.bench.workload import WorkloadSpec
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.quantization import FP8
from nanoflow_backend.engine import Engine
from nanoflow_backend.models.model import build
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter

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


def bench_offline(
    model: Path,
    output: Path | None,
    *,
    workloads: Sequence[WorkloadSpec],
    breakdown: bool,
    breakdown_only: bool,
    settings: Sequence[str],
    emulation: Emulation | None = None,
) -> None:
    """Total and output tokens per second of the whole run, ramp-up and tail included, and of its stationary part.

    Several workloads run one after the other on one engine; the result has them as `runs`. With `breakdown_only` there
    is no whole run: the engine takes up the workload until it is warm, and then a few steps are measured and profiled.
    With an `emulation` the engine is one rank alone, and the result says so.

    Raises:
        ConfigError: a breakdown without a GPU, or of several workloads without a run, a workload that ends before it,
            or an output that cannot be written.
    """
    if output:
        check_output(output)
    if breakdown and breakdown_only:
        raise ConfigError("--breakdown: expected none beside --breakdown-only")
    if breakdown_only and len(workloads) > 1:
        raise ConfigError(f"--breakdown-only: expected one --workload, got {len(workloads)}")
    make = emulation.make_engine if emulation else make_engine
    engine = make(model, settings, max_queue_size=str(max(spec.requests for spec in workloads)))
    option = "--breakdown-only" if breakdown_only else "--breakdown"
    if (breakdown or breakdown_only) and engine.config.device != "cuda":
        raise ConfigError(f"{option}: expected a GPU, the engine runs on {engine.executor.device.name}")
    meter = find_gpu_meter()
    if breakdown_only and meter is None:
        raise ConfigError(f"{option}: expected nvidia-ml-py, which measures the GPU")
    works = [spec.read(engine.max_model_tokens) for spec in workloads]
    facts = emulation.engine_facts(engine) if emulation else result.engine_facts(engine)
    if breakdown_only and meter is not None:
        queue_all(engine, works[0])
        measured = {"workload": works[0].name, **works[0].facts, **facts, **measure_warm_steps(engine, meter)}
    else:
        done = []
        for seed, work in enumerate(works):
            engine.scheduler.forget_lengths()
            queue_all(engine, work, seed)
            done.append(OfflineRun(engine, work, breakdown, meter))
            done[-1].to_the_end()
        optimum, roofs = _roofs(engine)
        runs = [run.measured(optimum) for run in done]
        measured = facts | roofs | (runs[0] if len(runs) == 1 else {"runs": runs})
        for run in runs:
            _show(facts | run)
    if output or breakdown_only:
        result.write(measured, output)
    engine.close()


def _roofs(engine: Engine) -> tuple[float, dict[str, Any]]:
    """Eq. 5's tokens/s of one device, and what the device can do at all, measured with the engine still in place."""
    config = engine.config
    model = build(engine.model_config, config.tensor_parallel)
    work = ModelWork.of(model, engine.model_config, config.precision)
    dtypes = {"gemm": config.precision.weights, **({"gemm_fp8": FP8} if work.fp8_parameters else {})}
    gemms = {
        name: gemm_flop_per_s(model, engine.model_config, config.dense_batch_tokens, dtype, config.device)
        for name, dtype in dtypes.items()
    }
    optimum = work.optimal_tokens_per_s(*(rate.per_s for rate in gemms.values()))
    return optimum, {
        "eq5_tokens_per_s_per_device": round(optimum, 1),
        **{name: msgspec.to_builtins(rate) for name, rate in gemms.items()},
        "memory": msgspec.to_builtins(memory_bytes_per_s(config.device)),
        "work": msgspec.to_builtins(work),
    }


def _show(measured: Mapping[str, Any]) -> None:
    """The figures that people ask for, of the whole run and of its stationary part. The result has all of them."""
    steady = measured["steady"]
    parts = {"whole run": measured, **({"steady": steady} if isinstance(steady, dict) else {})}
    about = f"{measured['requests']} requests of {measured['workload']}, {measured['model']}"
    table = Table("", *parts, title=result.labelled(about, measured))
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
