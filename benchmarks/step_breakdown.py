"""Where the time of a step goes: kernels of steps in the middle of an offline run, by torch's profiler.

python benchmarks/step_breakdown.py --model benchmarks/models/llama-3-8b --set load_format=dummy --output it.json
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nanoflow_backend.commands import result
from nanoflow_backend.commands.gpu_meter import find_gpu_meter
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import SamplingParams
from nanoflow_backend.scheduler.request import Request


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    input_tokens: int = 1024,
    output_tokens: int = 512,
    requests: int = 1500,
    warm_s: Annotated[float, typer.Option(help="Run so long before the profile.")] = 30.0,
    steps: Annotated[int, typer.Option(help="How many are profiled.")] = 10,
    settings: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    engine = make_engine(model, settings or [], max_waiting=str(requests))
    draw, vocab_size = random.Random(0), engine.model_config.vocab_size
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
    for number in range(requests):
        engine.add(Request(number, draw.choices(range(vocab_size), k=input_tokens), params))
    begin = time.perf_counter()
    while time.perf_counter() - begin < warm_s and engine.scheduler.stats.waiting_requests:
        engine.step()

    meter = find_gpu_meter()
    assert meter is not None, "a GPU, and nvidia-ml-py to measure it"
    before, tokens, cpu_s = meter.read(), engine.launched_tokens, time.thread_time()
    for _ in range(4 * steps):  # undisturbed by the profiler
        engine.step()
    after = meter.read()
    undisturbed = {
        "step_ms": round(1e3 * (after.time_s - before.time_s) / (4 * steps), 3),
        "total_tokens_per_s": round((engine.launched_tokens - tokens) / (after.time_s - before.time_s), 1),
        "power_w": round((after.energy_j - before.energy_j) / (after.time_s - before.time_s), 1),
        "sm_clock_mhz": after.sm_clock_mhz,
        "engine_thread_cpu_ms_per_step": round(1e3 * (time.thread_time() - cpu_s) / (4 * steps), 3),
    }
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            engine.step()
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiled.events()
        if event.device_type == DeviceType.CUDA
    )
    window_us, busy_us, reached = kernels[-1][1] - kernels[0][0], 0.0, kernels[0][0]
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for start, end, name in kernels:
        by_name[name].append(end - start)
        busy_us += max(end - max(start, reached), 0)
        reached = max(reached, end)
    stats = engine.scheduler.stats
    breakdown: list[dict[str, Any]] = [
        {
            "kernel": name[:120],
            "ms_per_step": round(sum(times) / steps / 1e3, 4),
            "per_step": len(times) / steps,
            "mean_us": round(mean(times), 2),
        }
        for name, times in sorted(by_name.items(), key=lambda item: -sum(item[1]))
    ]
    result.write(
        {
            "workload": f"{input_tokens}/{output_tokens}",
            "engine_is": engine.description,
            "running_requests": stats.running_requests,
            "used_pages": stats.used_pages,
            "undisturbed": undisturbed,
            "profiled_steps": steps,
            "step_ms": round(window_us / steps / 1e3, 3),
            "idle_share": round(1 - busy_us / window_us, 5),
            "kernels": breakdown,
        },
        output,
    )


if __name__ == "__main__":
    typer.run(main)
