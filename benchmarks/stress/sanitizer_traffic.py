"""Random traffic runs through the engine for minutes: every length, way to sample, cancellation and preemption.

The scheduler's books are checked after every step, and every request must end exactly once.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from nanoflow_backend.bench import result
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import SamplingParams
from nanoflow_backend.request.request import Request

MOST_LIVE = 96


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    duration_min: Annotated[float, typer.Option(help="Minutes in which requests arrive.")] = 4.0,
    seed: int = 0,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A field of engine.json; repeatable.")] = None,
) -> None:
    """Random traffic through the engine: run it under compute-sanitizer --error-exitcode 9."""
    engine = make_engine(model, settings or [])
    draw, vocab_size = random.Random(seed), engine.model_config.vocab_size
    longest = min(engine.max_model_tokens // 2, 1000)
    shared = draw.choices(range(vocab_size), k=longest)
    live: set[int] = set()
    ended: Counter[str] = Counter()
    added = processed_tokens = 0
    begin = time.monotonic()
    print(f"{engine.description}: random traffic for {duration_min:g} minutes", flush=True)
    while time.monotonic() - begin < 60 * duration_min or engine.has_work:
        arriving = time.monotonic() - begin < 60 * duration_min and len(live) < MOST_LIVE
        for _ in range(draw.choice((0, 0, 1, 5)) if arriving or not engine.has_work else 0):
            prompt = draw.choices(range(vocab_size), k=1 + int(draw.random() ** 3 * longest))
            if draw.random() < 0.3:
                prompt[: len(prompt) // 2] = shared[: len(prompt) // 2]
            params = SamplingParams(
                max_tokens=draw.randint(1, 100),
                temperature=draw.choice((0.0, 0.7, 1.0)),
                top_k=draw.choice((0, 0, 1, 40)),
                top_p=draw.choice((1.0, 1.0, 0.9)),
                logprobs=draw.choice((None, None, 3)),
                ignore_eos=draw.random() < 0.5,
            )
            engine.add(Request(added, prompt, params, priority=draw.randint(0, 1)))
            live.add(added)
            added += 1
        if live and draw.random() < 0.05:
            engine.cancel(draw.choice(sorted(live)))
        if not engine.has_work:
            continue
        for delta in engine.step():
            if delta.finish_reason is not None:
                live.remove(delta.request_id)
                ended[delta.finish_reason] += 1
        processed_tokens += engine.last_batch.tokens if engine.last_batch else 0
        engine.scheduler.check()
    stats = engine.scheduler.stats
    assert not live, f"never ended: {sorted(live)}"
    assert stats.used_pages == 0, f"pages are still held: {stats}"
    found = {
        "engine_is": engine.description,
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "requests": added,
        "ended": dict(ended),
        "steps": stats.steps,
        "preemptions": stats.preemptions,
        "prefix_hit_tokens": stats.prefix_hit_tokens,
        "processed_tokens": processed_tokens,
    }
    result.write(found, output)
