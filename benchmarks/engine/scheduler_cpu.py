"""The scheduler is measured alone: CPU time of one step at 1,000 running requests.

Two loads: 1,000 requests that only decode; and a cache that is full with about as many while 6,000 wait, so that
every step predicts page use. Thread CPU time of schedule() and retire(), in the engine's order, over 700 steps.
"""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from nanoflow_backend.bench import result
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler

RUNNING = 1_000
WARM_UP_STEPS, STEPS = 400, 700
WORD, EOS = 7, 2


def measure_load(waiting: int, num_pages: int, max_tokens: tuple[int, int]) -> dict[str, float]:
    draw = random.Random(0)
    limits = SchedulerLimits(
        dense_batch_tokens=2048,
        chunk_tokens=2048,
        prompt_tokens=2048,
        max_running=RUNNING,
        max_queue_size=RUNNING + waiting,
        num_pages=num_pages,
        page_tokens=64,
        max_model_tokens=8192,
    )
    scheduler = Scheduler(
        limits,
        eos_token_ids=[EOS],
    )
    for id in range(RUNNING + waiting):
        prompt = draw.choices(range(5, 30_000), k=draw.randint(400, 600))
        scheduler.add(Request(id, prompt, SamplingParams(max_tokens=draw.randint(*max_tokens))))
    gc.collect()
    gc.freeze()  # as an engine should, once it is set up: a full collection costs 10 ms every hundred steps
    before: Sampled | None = None
    schedule_ms, retire_ms, running = [], [], []
    for _ in range(WARM_UP_STEPS + STEPS):
        start = time.thread_time()
        batch = scheduler.schedule()
        middle = time.thread_time()
        assert batch is not None
        results = Sampled(batch.step, [WORD] * len(batch.sampled_slots))
        resumed = time.thread_time()
        scheduler.retire(before)
        end = time.thread_time()
        before = results
        schedule_ms.append(1e3 * (middle - start))
        retire_ms.append(1e3 * (end - resumed))
        running.append(len(batch.decode_slots))
    schedule, retire = np.array(schedule_ms[WARM_UP_STEPS:]), np.array(retire_ms[WARM_UP_STEPS:])
    return {
        "decodes_mean": float(np.mean(running[WARM_UP_STEPS:])),
        "schedule_p50_ms": round(float(np.median(schedule)), 3),
        "retire_p50_ms": round(float(np.median(retire)), 3),
        "both_p50_ms": round(float(np.median(schedule + retire)), 3),
        "both_p99_ms": round(float(np.percentile(schedule + retire, 99)), 3),
    }


def main(
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """CPU time of a step of the scheduler at 1,000 running requests: decoding alone, and a full cache with a queue."""
    loads = {
        "decode_only": measure_load(waiting=0, num_pages=40_000, max_tokens=(2_000, 2_000)),
        "full_cache_and_queue": measure_load(waiting=6_000, num_pages=15_625, max_tokens=(200, 600)),
    }
    result.write(loads, output)
