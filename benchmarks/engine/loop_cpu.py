"""The engine's thread is measured with a device that costs nothing: its CPU time a step, by part."""

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
import typer

from benchmarks.engine.null_engine import NullProgram
from nanoflow_backend.bench import result
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.engine.local_executor import LocalExecutor
from nanoflow_backend.process.reporter import Reporter
from nanoflow_backend.request.request import Request

SPARE_TOKENS, WARM_UP_STEPS = 24, 20  # of a step beside all decodes; before those that are measured
MEASURED = ("running_requests", "steps", "median_thread_cpu_ms", "total_ms_per_step", "p99_step_ms")


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    against: Annotated[Path | None, typer.Option(help="A checkout of another commit.")] = None,
    rounds: Annotated[int, typer.Option(help="Of A B B A, with --against.")] = 3,
    concurrency: Annotated[int, typer.Option(help="Requests that decode.")] = 1000,
    prompt_tokens: Annotated[int, typer.Option(help="Of each request.")] = 64,
    steps: Annotated[int, typer.Option(help="That are measured.")] = 300,
) -> None:
    """Thread CPU time of an engine's step, by part: requests that decode, and a program that does nothing.

    With --against both commits are measured in turn: what else the machine does meets both.
    """
    load = [os.getloadavg()[0]]
    if against is None:
        measured = measure_steps(model, concurrency, prompt_tokens, steps)
    else:
        options = [f"--model={model.resolve()}", f"--concurrency={concurrency}"]
        options += [f"--prompt-tokens={prompt_tokens}", f"--steps={steps}"]
        measured = compare_checkouts(Path(__file__).parents[2], against.resolve(), options, rounds)
    load.append(os.getloadavg()[0])
    result.write({**measured, "load_average_before_and_after": load}, output)


def measure_steps(model: Path, running: int, prompt_tokens: int, steps: int) -> dict[str, Any]:
    """Measure this checkout's code in this process: milliseconds of thread CPU time."""
    prompt_steps = -(-running * prompt_tokens // SPARE_TOKENS)  # at most, until all decode
    max_tokens = max(2 * steps, prompt_steps + WARM_UP_STEPS + steps + 1)
    engine = Engine.from_pretrained(
        model,
        device="cpu",
        dense_batch_tokens=running + SPARE_TOKENS,
        max_running=running,
        kv_cache_tokens=running * (prompt_tokens + max_tokens + 128),  # room for all at their longest
        page_tokens=64,
    )
    executor = cast(LocalExecutor, engine.executor)
    executor.worker.program = NullProgram(executor.worker.program, running + SPARE_TOKENS)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0)
    for number in range(running):
        engine.add(Request(number, [number % 7] * prompt_tokens, params))
    while engine.scheduler.stats.waiting_requests:
        engine.step()
    for _ in range(WARM_UP_STEPS):
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
    reporter = Reporter(msgspec.msgpack.Encoder().encode, engine.scheduler)
    engine.on_scheduled = reporter.scheduled
    report = timed("report", reporter.stepped)
    for _ in range(steps):
        report(step(), True)
    assert engine.scheduler.stats.running_requests == running, "all requests decode in every measured step"
    milliseconds = {name: round(1e3 * median(times), 3) for name, times in cpu_s.items()}
    total = milliseconds["step"] + milliseconds["report"]
    return {
        "running_requests": running,
        "steps": steps,
        "median_thread_cpu_ms": milliseconds,
        "total_ms_per_step": round(total, 3),
        "p99_step_ms": round(1e3 * sorted(cpu_s["step"])[int(0.99 * steps)], 3),
    }


def compare_checkouts(here: Path, there: Path, options: list[str], rounds: int) -> dict[str, Any]:
    """Two checkouts in turn, A B B A, each run in a process of its own, by that checkout's own command and code.

    Returns the median run of each (of two in the middle the faster), and the totals of all.

    Raises:
        BadParameter: `there` has no such command.
    """
    if not (there / "benchmarks" / "engine" / "loop_cpu.py").exists():
        raise typer.BadParameter(f"--against: expected a checkout with `python -m benchmarks loop-cpu`, got {there}")
    runs: defaultdict[Path, list[dict[str, Any]]] = defaultdict(list)
    for checkout in (here, there, there, here) * rounds:
        path = os.pathsep.join(str(checkout / folder) for folder in ("", "kernels", "search"))
        ran = subprocess.run(
            [sys.executable, "-m", "benchmarks", "loop-cpu", *options],
            cwd=checkout,
            env=os.environ | {"PYTHONPATH": path},
            check=True,
            capture_output=True,
        )
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
