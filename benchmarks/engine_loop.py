"""What the engine's thread costs a step when the device costs nothing: 1,000 decoding requests, a program that does
nothing, thread CPU time by part.

    python benchmarks/engine_loop.py --model demo/tiny-llama --output benchmarks/results/engine_loop.json

With `--against`, a checkout of another commit, both are measured in turn: what else the machine does meets both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Annotated, Any, cast

import msgspec
import torch
import typer

from nanoflow_backend.bench import result
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.engine.local_executor import LocalExecutor
from nanoflow_backend.engine.loop import queue
from nanoflow_backend.process.messages import News
from nanoflow_backend.request.request import Request
from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.runtime.program import Program

MEASURED = ("running_requests", "steps", "median_thread_cpu_ms", "total_ms_per_step", "p99_step_ms")


class NullProgram:
    """A Program that chooses plans as `program` does, and whose every row has the same logits."""

    def __init__(self, program: Program, rows: int) -> None:
        self._program = program
        columns = 8  # sampling from a vocabulary is the device's work
        self.logits = torch.zeros(rows, columns).index_fill(1, torch.tensor([3]), 1.0)

    def plan_for(self, tokens: int, decode_kv_tokens: int) -> FittedPlan:
        return self._program.plan_for(tokens, decode_kv_tokens)

    def forward(self, *inputs: torch.Tensor) -> None: ...

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        return self.logits[: len(rows)]

    def fill(self, page_table: torch.Tensor) -> None: ...

    def warm_up(self, page_table: torch.Tensor) -> None: ...


def main(
    model: Annotated[Path, typer.Option()],
    output: Annotated[Path | None, typer.Option()] = None,
    against: Annotated[Path | None, typer.Option(help="A checkout of another commit.")] = None,
    rounds: Annotated[int, typer.Option(help="Of A B B A, with --against.")] = 3,
    running: int = 1000,
    prompt_tokens: int = 64,
    steps: int = 300,
) -> None:
    load = [os.getloadavg()[0]]
    if against is None:
        measured = measure(model, running, prompt_tokens, steps)
    else:
        options = [f"--model={model.resolve()}", f"--running={running}", f"--prompt-tokens={prompt_tokens}"]
        measured = compare(Path(__file__).parents[1], against.resolve(), [*options, f"--steps={steps}"], rounds)
    load.append(os.getloadavg()[0])
    result.write({**measured, "load_average_before_and_after": load}, output)


def measure(model: Path, running: int, prompt_tokens: int, steps: int) -> dict[str, Any]:
    """In this process."""
    engine = Engine.from_pretrained(
        model,
        device="cpu",
        dense_batch_tokens=running + 24,
        max_running=running,
        kv_cache_tokens=running * (prompt_tokens + 2 * steps + 128),  # room for all at their longest
        page_tokens=64,
    )
    executor = cast(LocalExecutor, engine.executor)
    executor.worker.program = NullProgram(executor.worker.program, running + 24)
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
    executor.launch_forward = timed("launch_forward", executor.launch_forward)  # type: ignore[method-assign]
    executor.launch_tail = timed("launch_tail", executor.launch_tail)  # type: ignore[method-assign]
    executor.collect = timed("collect", executor.collect)  # type: ignore[method-assign]
    step = timed("step", engine.step)
    encode = timed("encode_news", msgspec.msgpack.Encoder().encode)
    for _ in range(steps):
        encode(News(step(), queue(engine, 0)))
    assert engine.scheduler.stats.running_requests == running, "all requests decode in every measured step"
    milliseconds = {name: round(1e3 * median(times), 3) for name, times in cpu_s.items()}
    total = milliseconds["step"] + milliseconds["encode_news"]
    return {
        "running_requests": running,
        "steps": steps,
        "median_thread_cpu_ms": milliseconds,
        "total_ms_per_step": round(total, 3),
        "p99_step_ms": round(1e3 * sorted(cpu_s["step"])[int(0.99 * steps)], 3),
    }


def compare(here: Path, there: Path, options: list[str], rounds: int) -> dict[str, Any]:
    """Two checkouts in turn, A B B A, each run in a process of its own, by that checkout's own script and code.

    Returns the median run of each (of two in the middle the faster), and the totals of all.
    """
    runs: defaultdict[Path, list[dict[str, Any]]] = defaultdict(list)
    for checkout in (here, there, there, here) * rounds:
        path = os.pathsep.join(str(checkout / folder) for folder in ("", "kernels", "search"))
        command = [sys.executable, checkout / "benchmarks" / "engine_loop.py", *options]
        ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True)
        runs[checkout].append(msgspec.json.decode(ran.stdout))
        print(checkout.name, runs[checkout][-1]["total_ms_per_step"], file=sys.stderr)
    ours, theirs = (sorted(runs[checkout], key=itemgetter("total_ms_per_step")) for checkout in (here, there))
    middle, their_middle = ours[(len(ours) - 1) // 2], theirs[(len(theirs) - 1) // 2]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=there, check=True, capture_output=True, text=True
    )
    return {
        **{key: middle[key] for key in MEASURED},
        "totals_ms": [run["total_ms_per_step"] for run in ours],
        "against": {
            "commit": commit.stdout.strip(),
            **{key: their_middle[key] for key in MEASURED},
            "totals_ms": [run["total_ms_per_step"] for run in theirs],
        },
    }


if __name__ == "__main__":
    typer.run(main)
