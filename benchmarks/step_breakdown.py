"""Where the time of a step goes, without the rest of an offline run: `nanoflow bench offline --breakdown` in a minute.

python benchmarks/step_breakdown.py --model benchmarks/models/llama-3-8b --set load_format=dummy --output it.json
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from nanoflow_backend.bench import result, workload
from nanoflow_backend.bench.breakdown import break_down
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import SamplingParams
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.gpu_meter import find_gpu_meter


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    input_tokens: int = 1024,
    output_tokens: int = 512,
    requests: int = 1500,
    warm_s: Annotated[float, typer.Option(help="Run so long before the profile.")] = 30.0,
    undisturbed_steps: Annotated[int, typer.Option(help="Between both, with no profiler.")] = 40,
    settings: Annotated[list[str] | None, typer.Option("--set")] = None,
) -> None:
    meter = find_gpu_meter()
    if meter is None:
        raise SystemExit("expected a GPU, and nvidia-ml-py to measure it")
    engine = make_engine(model, settings or [], max_queue_size=str(requests))
    work = workload.constant(input_tokens, output_tokens, requests)
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
    for number, prompt in enumerate(work.prompts(engine.model_config.vocab_size)):
        engine.add(Request(number, prompt, params))
    begin_s = time.perf_counter()
    while time.perf_counter() - begin_s < warm_s and engine.scheduler.stats.waiting_requests:
        engine.step()

    before, tokens, cpu_s = meter.read(), 0, time.thread_time()
    for _ in range(undisturbed_steps):
        engine.step()
        tokens += engine.last_batch.tokens if engine.last_batch else 0
    after, cpu_s = meter.read(), time.thread_time() - cpu_s
    seconds = after.time_s - before.time_s
    result.write(
        {
            "workload": work.name,
            **result.engine_facts(engine),
            "running_requests": engine.scheduler.stats.running_requests,
            "used_pages": engine.scheduler.stats.used_pages,
            "undisturbed": {
                "step_ms": round(1e3 * seconds / undisturbed_steps, 3),
                "total_tokens_per_s": round(tokens / seconds, 1),
                "power_w": round((after.energy_j - before.energy_j) / seconds, 1),
                "sm_clock_mhz": after.sm_clock_mhz,
                "engine_thread_cpu_ms_per_step": round(1e3 * cpu_s / undisturbed_steps, 3),
            },
            **break_down(engine, lambda: engine.step()),
        },
        output,
    )


if __name__ == "__main__":
    typer.run(main)
