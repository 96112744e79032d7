"""A few steps of a warm engine are measured and then profiled: where the time of a step goes, without a whole run."""

from __future__ import annotations

import time
from typing import Any

from nanoflow_backend.bench.breakdown import break_down
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine
from nanoflow_backend.runtime.gpu_meter import GpuMeter

WARM_S = 30.0  # of the workload before the steps that are measured, at most: no longer than requests wait
UNDISTURBED_STEPS = 40  # with no profiler


def measure_warm_steps(engine: Engine, meter: GpuMeter, warm_s: float = WARM_S) -> dict[str, Any]:
    """Take up the requests of `engine` until it is warm, time steps, and profile as many more as `break_down` does.

    Raises:
        ConfigError: the requests ended before.
    """
    warm_from_s = time.perf_counter()
    while time.perf_counter() - warm_from_s < warm_s and engine.scheduler.stats.waiting_requests:
        engine.step()
    before, tokens, cpu_from_s = meter.read(), 0, time.thread_time()
    for _ in range(UNDISTURBED_STEPS):
        engine.step()
        tokens += engine.last_batch.tokens if engine.last_batch else 0
    after, cpu_s = meter.read(), time.thread_time() - cpu_from_s
    if not engine.has_work:
        raise ConfigError("--breakdown-only: the requests ended before the profile: more --requests or --output-tokens")
    seconds = after.time_s - before.time_s
    return {
        "running_requests": engine.scheduler.stats.running_requests,
        "used_pages": engine.scheduler.stats.used_pages,
        "undisturbed": {
            "step_ms": round(1e3 * seconds / UNDISTURBED_STEPS, 3),
            "total_tokens_per_s": round(tokens / seconds, 1),
            "power_w": round((after.energy_j - before.energy_j) / seconds, 1),
            "sm_clock_mhz": after.sm_clock_mhz,
            "engine_thread_cpu_ms_per_step": round(1e3 * cpu_s / UNDISTURBED_STEPS, 3),
        },
        **break_down(engine, engine.step),
    }
