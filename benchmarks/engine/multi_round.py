"""Conversations that come back, simulated with the real scheduler and its tiers: what host memory is worth, no device.

Times are those of the cost of a step that was measured for Llama-3-8B on an H200 (bench/multi_round/bound.py); tokens
and pages are counted, and do not depend on the machine.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from nanoflow_backend.bench import result
from nanoflow_backend.bench.multi_round.bound import Bound, StepCost
from nanoflow_backend.bench.multi_round.conversations import draw_conversations
from nanoflow_backend.bench.multi_round.driver import Driver
from nanoflow_backend.bench.multi_round.summary import summarise
from nanoflow_backend.bench.pretend.engine import PretendEngine
from nanoflow_backend.bench.pretend.host_memory import HostMemory
from nanoflow_backend.scheduler.limits import SchedulerLimits

TOKEN_BYTES = 131072  # of Llama-3-8B's KV cache in bf16


def main(
    dataset: Annotated[Literal["lmsys-like", "sharegpt-like"], typer.Option(help="Rounds and lengths as there.")],
    conversations: Annotated[int, typer.Option(min=1, help="How many in all.")] = 3000,
    kv_cache_tokens: Annotated[int, typer.Option(min=64, help="Tokens that the device holds.")] = 150_000,
    host_gib: Annotated[list[float] | None, typer.Option(help="Of host memory; repeatable. [73]")] = None,
    times_device: Annotated[float, typer.Option(help="KV of the active conversations, in devices.")] = 4.0,
    think_s: Annotated[float, typer.Option(min=0, help="Mean time between an answer and the next turn.")] = 0.0,
    dense_batch_tokens: int = 2048,
    max_running: int = 1024,
    page_tokens: int = 64,
    max_model_tokens: int = 8192,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """Simulate recomputing, a prefix cache on the device alone, and host memory below it, beside the trace's bound.

    With host memory a request computes pages from the front while others load from the back; `loads_only` computes
    nothing that can be loaded.
    """
    drawn = draw_conversations(dataset, conversations, max_model_tokens, think_s=think_s, seed=seed)
    active = max(1, round(times_device * kv_cache_tokens / drawn.mean_context_tokens))
    cost = StepCost()
    bound = partial(Bound.of, cost=cost, kv_cache_tokens=kv_cache_tokens)
    limits = SchedulerLimits(
        dense_batch_tokens=dense_batch_tokens,
        chunk_tokens=dense_batch_tokens,
        prompt_tokens=dense_batch_tokens,
        max_running=max_running,
        max_queue_size=active,
        num_pages=kv_cache_tokens // page_tokens,
        page_tokens=page_tokens,
        max_model_tokens=max_model_tokens,
    )
    hosts = {}
    for gib in host_gib or [73.0]:
        host = HostMemory(int(gib * 2**30) // TOKEN_BYTES)
        hosts |= {f"host_{gib:g}_gib": host, f"host_{gib:g}_gib_loads_only": replace(host, loads_only=True)}
    arms: dict[str, Any] = {}
    for name, host in {"recomputing": None, "device": None, **hosts}.items():
        engine = PretendEngine.before(host, limits, cost.of_batch, prefix_caching=name != "recomputing")
        driver = Driver(drawn, active, vocab_size=2**17, seed=seed)
        start_s = time.perf_counter()
        driver.run(engine, engine.clock, engine.clock.sleep)
        arms[name] = {
            **summarise(driver, bound),
            "steps": engine.steps,
            "computed_prompt_tokens": engine.computed_prompt_tokens,  # after preemptions, too
            "simulated_in_s": round(time.perf_counter() - start_s, 1),
            "scheduler": msgspec.to_builtins(engine.scheduler.stats),
        }
        print(name, {key: arms[name][key] for key in ("rounds_per_s", "share_of_bound", "cached_share")}, flush=True)
    settings = {
        "kv_cache_tokens": kv_cache_tokens,
        "host_tokens": {name: host.tokens for name, host in hosts.items()},
        "dense_batch_tokens": dense_batch_tokens,
        "max_running": max_running,
        "page_tokens": page_tokens,
        "times_device": times_device,
        "step_cost": msgspec.to_builtins(cost),
    }
    facts = {**drawn.facts, "mean_context_tokens": round(drawn.mean_context_tokens, 1)}
    result.write({"workload": drawn.name, **facts, "settings": settings, "arms": arms}, output)
