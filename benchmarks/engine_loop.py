"""What the engine's thread costs a step when the device costs nothing: 1,000 decoding requests, a program that does
nothing, thread CPU time by part.

    python benchmarks/engine_loop.py --model demo/tiny-llama --output benchmarks/results/engine_loop.json
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import torch
import typer

from nanoflow_backend.commands import result
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.engine.loop import queue
from nanoflow_backend.engine.messages import News
from nanoflow_backend.scheduler.request import Request


class NullProgram:
    """A Program whose every row has the same logits."""

    def __init__(self, rows: int) -> None:
        columns = 8  # sampling from a vocabulary is the device's work
        self.logits = torch.zeros(rows, columns).index_fill(1, torch.tensor([3]), 1.0)

    def forward(self, *inputs: torch.Tensor) -> None: ...

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(rows)]


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    running: int = 1000,
    prompt_tokens: int = 64,
    steps: int = 300,
) -> None:
    engine = Engine.from_pretrained(
        model,
        device="cpu",
        dense_batch_tokens=running + 24,
        max_running=running,
        kv_cache_tokens=running * (prompt_tokens + 2 * steps + 128),  # room for all at their longest
        page_tokens=64,
    )
    engine.worker.program = NullProgram(running + 24)
    params = SamplingParams(max_tokens=2 * steps, ignore_eos=True, temperature=0.0)
    for number in range(running):
        engine.add(Request(number, [number % 7] * prompt_tokens, params))
    while engine.scheduler.stats.waiting_requests:
        engine.step()
    for _ in range(20):
        engine.step()

    cpu_s: defaultdict[str, list[float]] = defaultdict(list)

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            start = time.thread_time()
            answer = call(*arguments)
            cpu_s[name].append(time.thread_time() - start)
            return answer

        return wrapper

    engine.scheduler.schedule = timed("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine.scheduler.retire = timed("retire", engine.scheduler.retire)  # type: ignore[method-assign]
    engine.worker.launch_forward = timed("launch_forward", engine.worker.launch_forward)  # type: ignore[method-assign]
    engine.worker.launch_tail = timed("launch_tail", engine.worker.launch_tail)  # type: ignore[method-assign]
    engine.worker.collect = timed("collect", engine.worker.collect)  # type: ignore[method-assign]
    step = timed("step", engine.step)
    encode = timed("encode_news", msgspec.msgpack.Encoder().encode)
    for _ in range(steps):
        encode(News(step(), queue(engine, 0)))
    assert engine.scheduler.stats.running_requests == running, "all requests decode in every measured step"
    milliseconds = {name: round(1e3 * median(times), 3) for name, times in cpu_s.items()}
    total = milliseconds["step"] + milliseconds["encode_news"]
    result.write(
        {
            "running_requests": running,
            "steps": steps,
            "median_thread_cpu_ms": milliseconds,
            "total_ms_per_step": round(total, 3),
            "p99_step_ms": round(1e3 * sorted(cpu_s["step"])[int(0.99 * steps)], 3),
        },
        output,
    )


if __name__ == "__main__":
    typer.run(main)
