"""`nanoflow bench online` measures latency with a fixed number of requests in flight."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from nanoflow_backend.bench import result, workload
from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.bench.roofs import memory_bytes_per_s
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.models.model import build
from nanoflow_backend.offline.output import check_output
from nanoflow_backend.request.request import Request

PERCENTILES = (50, 90, 99)


def bench_online(
    model: Path,
    output: Path | None,
    input_tokens: int,
    output_tokens: int,
    requests: int,
    concurrency: Sequence[int],
    settings: Sequence[str],
) -> None:
    """Time to the first token and between tokens, by how many requests are in flight. Text, sockets and the server
    are not in these times: the engine runs in this process.

    Raises:
        ConfigError: the output cannot be written.
    """
    if output:
        check_output(output)
    engine = make_engine(model, settings, max_queue_size=str(max(concurrency)))
    prompts = workload.random_prompts(itertools.repeat(input_tokens), engine.model_config.vocab_size)
    levels = [run_level(engine, clients, prompts, output_tokens, requests) for clients in concurrency]
    found: dict[str, Any] = {"levels": [level.summary() for level in levels]}
    if alone := next((level for level in levels if level.clients == 1), None):
        found["single_stream"] = single_stream(engine, alone)
    _show(found)
    if output:
        result.write({"workload": f"{input_tokens}/{output_tokens}", **result.engine_facts(engine), **found}, output)
    engine.close()


@dataclass
class Timed:
    """A request; times of time.perf_counter()."""

    sent_s: float
    token_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Level:
    """The measured requests of `clients` that each send the next one when the last has ended."""

    clients: int
    timed: Sequence[Timed]

    @property
    def first_token_s(self) -> np.ndarray:
        return np.array([request.token_s[0] - request.sent_s for request in self.timed])

    @property
    def between_tokens_s(self) -> np.ndarray:
        return np.concatenate([np.diff(request.token_s) for request in self.timed])

    def summary(self) -> dict[str, Any]:
        end_s, begin_s = max(r.token_s[-1] for r in self.timed), min(r.sent_s for r in self.timed)
        return {
            "concurrency": self.clients,
            "requests": len(self.timed),
            "wall_s": round(end_s - begin_s, 3),  # from the first that was sent to the last that ended
            "first_token_ms": _percentiles(self.first_token_s),
            "between_tokens_ms": _percentiles(self.between_tokens_s),
        }


def run_level(engine: Engine, clients: int, prompts: Iterator[list[int]], output_tokens: int, requests: int) -> Level:
    """A closed loop; at least `requests` are measured, and one of each client. Its first one is not, for these all
    come at once; nor are those that keep the others company until the last measured one has ended."""
    params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, temperature=0.0)
    measured = range(clients, clients + max(requests, clients))
    numbers = itertools.count()
    live: dict[int, Timed] = {}
    ended: list[Timed] = []

    def send() -> None:
        request = Request(next(numbers), next(prompts), params)
        live[request.id] = Timed(time.perf_counter())
        engine.add(request)

    for _ in range(clients):
        send()
    while len(ended) < len(measured):
        deltas, now_s = engine.step(), time.perf_counter()
        for delta in deltas:
            live[delta.request_id].token_s += [now_s] * len(delta.token_ids)
            if delta.finish_reason:
                request = live.pop(delta.request_id)
                if delta.request_id in measured:
                    ended.append(request)
                send()
    engine.cancel_all()
    while engine.has_work:
        engine.step()
    return Level(clients, ended)


def single_stream(engine: Engine, alone: Level) -> dict[str, Any]:
    """Decoding one request reads all weights for every token: its rate, and that of reading alone."""
    config = engine.config
    work = ModelWork.of(build(engine.model_config, config.tensor_parallel), engine.model_config, config.precision)
    memory = memory_bytes_per_s(config.device)
    tokens_per_s, bound = 1 / float(alone.between_tokens_s.mean()), memory.per_s / work.token_weight_bytes
    return {
        "tokens_per_s": round(tokens_per_s, 2),
        "weight_read_bound_tokens_per_s": round(bound, 2),
        "share_of_bound": round(tokens_per_s / bound, 4),
        "weight_bytes": work.token_weight_bytes,
        "memory": msgspec.to_builtins(memory),
    }


def _show(found: dict[str, Any]) -> None:
    table = Table("in flight", *(f"{what} p{p}, ms" for what in ("first token", "between") for p in PERCENTILES))
    for level in found["levels"]:
        times = (*level["first_token_ms"].values(), *level["between_tokens_ms"].values())
        table.add_row(str(level["concurrency"]), *(f"{ms:,.1f}" for ms in times))
    console = Console(highlight=False)
    console.print(table)
    if alone := found.get("single_stream"):
        rate, share = alone["tokens_per_s"], alone["share_of_bound"]
        console.print(f"one request alone: {rate:.1f} tokens/s, {share:.0%} of what reading the weights allows")


def _percentiles(times_s: np.ndarray) -> dict[str, float]:
    return {
        f"p{p}": round(1e3 * float(value), 3)
        for p, value in zip(PERCENTILES, np.percentile(times_s, PERCENTILES), strict=True)
    }
