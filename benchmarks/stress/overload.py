"""Every request has an end that its client learns, also when more come than the server can do.

First the capacity: requests a second with clients that wait for their answer. Then requests come at random times
(Poisson) at multiples of it, whether or not earlier ones were answered. Each is in the ledger once: done in time, done
late, refused (by reason), or lost. The same with a queue that is as good as endless shows what the limits are for.

Clients, server, stub and engine share the machine's cores.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from statistics import quantiles
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.server import serve_model
from nanoflow_backend.bench import result

PATIENCE_S = 120.0  # then a request is lost
RUNNING = 32
LIMITS = {
    "limited": {"max_queue_size": 2 * RUNNING, "queue_timeout_us": 2_000_000},
    "unlimited": {"max_queue_size": 1_000_000},
}
REFUSALS = {
    "queue full": "as many as max_queue_size allows",
    "queue timeout": "queue_timeout: still waiting",
    "deadline": "timeout: not done",
}
# A connection for each thread: a new one a request overflows the server's backlog now and then.
kept = threading.local()


class Ended(NamedTuple):
    """How one request ended."""

    outcome: str
    lag_s: float  # between the time it should have been sent and the time it was
    latency_s: float


class OfferedRequest(NamedTuple):
    """One request of random length."""

    prompt: str
    max_tokens: int


def main(
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")],
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    duration_s: Annotated[float, typer.Option(help="Of each load.")] = 15.0,
    slo_s: Annotated[float, typer.Option(help="A request that takes longer is late.")] = 5.0,
    rounds: int = 3,
) -> None:
    """What becomes of every request at the capacity and at twice that, with limits of the queue and without."""
    arms: dict[str, Any] = {}
    for arm, limits in LIMITS.items():
        rng = random.Random(7)
        ledgers: dict[int, list[list[Ended]]] = {1: [], 2: []}
        capacities, loads = [], []
        with serve_model(model, max_running=RUNNING, dense_batch_tokens=256, **limits) as server:
            for _ in range(rounds):  # rates beside their capacity, for others use this machine too
                capacities.append(measure_capacity(server.http_url, duration_s, rng))
                for multiple, rounds_ in ledgers.items():
                    rounds_.append(offer(server.http_url, multiple * capacities[-1], duration_s, slo_s, rng))
                    loads.append(os.getloadavg()[0])
            assert post_request(server.http_url, OfferedRequest("def", 4)) == (200, "4"), "the server goes on as before"
        arms[arm] = {
            **limits,
            "load_average_range": [round(min(loads), 1), round(max(loads), 1)],
            "capacity_requests_per_s": [round(capacity, 1) for capacity in capacities],
            **{f"at_{multiple}x": summarise_load(rounds_, duration_s) for multiple, rounds_ in ledgers.items()},
        }
    result.write({"max_running": RUNNING, "seconds": duration_s, "slo_s": slo_s, "rounds": rounds, **arms}, output)


def draw_request(rng: random.Random) -> OfferedRequest:
    return OfferedRequest("def " + " ".join(str(rng.randrange(100)) for _ in range(16)), rng.randint(16, 64))


def measure_capacity(url: str, seconds: float, rng: random.Random) -> float:
    """Requests a second with as many clients as requests can run."""
    ends_s = time.monotonic() + seconds
    done = []
    drawing = threading.Lock()

    def client(_: int) -> None:
        while time.monotonic() < ends_s:
            with drawing:
                request = draw_request(rng)
            status, text = post_request(url, request)
            assert status == 200, text
            done.append(request)

    with ThreadPoolExecutor(RUNNING) as pool:
        list(pool.map(client, range(RUNNING)))
    return len(done) / (time.monotonic() - ends_s + seconds)


def offer(url: str, rate: float, seconds: float, slo_s: float, rng: random.Random) -> list[Ended]:
    """Send at random times, and wait for every answer."""

    def run(due_s: float, request: OfferedRequest) -> Ended:
        sent_s = time.monotonic()
        try:
            status, text = post_request(url, request)
        except OSError as error:
            return Ended(f"lost: {error!r}", sent_s - due_s, time.monotonic() - sent_s)
        latency_s = time.monotonic() - sent_s
        if status == 200:
            whole = text == str(request.max_tokens)
            outcome = ("in time" if latency_s <= slo_s else "late") if whole else f"wrong: {text}"
        else:
            outcome = next((name for name, message in REFUSALS.items() if message in text), f"wrong: {text}")
        return Ended(outcome, sent_s - due_s, latency_s)

    start_s = due_s = time.monotonic()
    answers = []
    with ThreadPoolExecutor(4096) as pool:
        while (due_s := due_s + rng.expovariate(rate)) < start_s + seconds:
            time.sleep(max(0.0, due_s - time.monotonic()))
            answers.append(pool.submit(run, due_s, draw_request(rng)))
        return [answer.result() for answer in answers]


def post_request(url: str, request: OfferedRequest) -> tuple[int, str]:
    """(status, number of output tokens or what else the server says). Raises: OSError."""
    body = {
        "text_input": request.prompt,
        "max_tokens": request.max_tokens,
        "ignore_eos": True,
        "return_num_output_tokens": True,
    }
    if getattr(kept, "url", None) != url:
        kept.url, kept.connection = url, http.client.HTTPConnection(url, timeout=PATIENCE_S)
    kept.connection.request("POST", "/v2/models/nanoflow/generate", json.dumps(body))
    response = kept.connection.getresponse()
    text = response.read().decode()
    return response.status, str(json.loads(text)["num_output_tokens"]) if response.status == 200 else text


def summarise_load(rounds: list[list[Ended]], seconds: float) -> dict[str, Any]:
    entries = list(chain(*rounds))
    outcomes = Counter(entry.outcome for entry in entries)
    refused = [entry.latency_s for entry in entries if entry.outcome == "queue full"]
    done = [entry.latency_s for entry in entries if entry.outcome in ("in time", "late")]
    return {
        "sent": len(entries),
        **{outcome: outcomes.pop(outcome, 0) for outcome in ("in time", "late", *REFUSALS)},
        "lost or wrong": sum(outcomes.values()),
        "goodput_requests_per_s": [
            round(sum(entry.outcome == "in time" for entry in ledger) / seconds, 1) for ledger in rounds
        ],
        "refusal_latency_ms": percentiles_ms(refused),
        "latency_ms": percentiles_ms(done),
        "client_lag_ms": percentiles_ms([entry.lag_s for entry in entries]),
    }


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = quantiles(seconds, n=100, method="inclusive")
    return {
        name: round(1000 * value, 1) for name, value in (("p50", cuts[49]), ("p99", cuts[98]), ("max", max(seconds)))
    }
