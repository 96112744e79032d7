"""run_level measures latency with a fixed number of requests in flight: each is followed by the next."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from nanoflow_backend.bench.model_work import ModelWork
from nanoflow_backend.bench.online.latency import Timed, between_tokens_s, percentiles_ms
from nanoflow_backend.bench.roofs import memory_bytes_per_s
from nanoflow_backend.engine import Engine, SamplingParams
from nanoflow_backend.models.model import build
from nanoflow_backend.request.request import Request


@dataclass(frozen=True)
class Level:
    """The measured requests of `clients` that each send the next one when the last has ended."""

    clients: int
    timed: Sequence[Timed]

    def summary(self) -> dict[str, Any]:
        end_s, begin_s = max(r.token_s[-1] for r in self.timed), min(r.due_s for r in self.timed)
        return {
            "concurrency": self.clients,
            "requests": len(self.timed),
            "wall_s": round(end_s - begin_s, 3),  # from the first that was sent to the last that ended
            "first_token_ms": percentiles_ms([request.first_token_s for request in self.timed]),
            "between_tokens_ms": percentiles_ms(between_tokens_s(self.timed)),
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
        now_s = time.perf_counter()
        live[request.id] = Timed(now_s, now_s, output_tokens)
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
    tokens_per_s, bound = 1 / float(between_tokens_s(alone.timed).mean()), memory.per_s / work.token_weight_bytes
    return {
        "tokens_per_s": round(tokens_per_s, 2),
        "weight_read_bound_tokens_per_s": round(bound, 2),
        "share_of_bound": round(tokens_per_s / bound, 4),
        "weight_bytes": work.token_weight_bytes,
        "memory": msgspec.to_builtins(memory),
    }
