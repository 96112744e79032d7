"""The demo model is soaked at twice its capacity, with all that goes wrong in production, and gets a verdict."""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.server import DEMO_MODEL, serve_model
from benchmarks.serving import server_state
from benchmarks.stress.ledger import ANSWERED, CANCELLED, DISCONNECTED
from benchmarks.stress.soak_client import MIX, MODEL, SoakClient
from nanoflow_backend.bench import result
from nanoflow_backend.embedded.server import EmbeddedServer

# A queue that fills in a second, and fewer pages than the running requests may need: some are preempted.
SETTINGS = {
    "max_running": 32,
    "max_queue_size": 32,
    "dense_batch_tokens": 256,
    "kv_cache_tokens": 2048,
    "engine_stall_s": 3.0,
}
OVERLOAD = 2.0
MAX_REFUSAL_P99_MS = 100.0
MAX_LATE_MS = 1000.0  # after its timeout a request must have ended, also while the engine is stuck
# Growth from the first third of the rounds to the last one, as medians: what is no leak. The stub of a reloaded model
# inherits what the server has open, some 25 descriptors; shared memory grows by 1 MiB at a time.
MAX_GROWTH = {"stub_fds": 32.0, "fds": 4.0, "lost_sockets": math.inf, "shm_mib": 1.0, "processes": 0.0}
MAX_RSS_GROWTH, ALLOCATOR_MIB = 0.05, 8.0
# Connections that the 2.51 server keeps, by clients that left (see soak_client.py): 8 of some 240 in a soak. None
# without such clients.
MAX_LOST_SOCKETS, LOST_BY_CHANCE = 0.1, 1


def main(
    duration_min: Annotated[float, typer.Option(help="Minutes of rounds.")] = 30.0,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    round_s: Annotated[float, typer.Option(help="Of load, between two silences.")] = 20.0,
    seed: int = 0,
    tensor_parallel: Annotated[int, typer.Option(help="Ranks of the engine.")] = 1,
) -> None:
    """The demo model at twice its capacity, with kills, reloads and cancels; exits with 1 if anything failed."""
    report = soak(60 * duration_min, round_s, seed, functools.partial(print, flush=True), tensor_parallel)
    setting = {"minutes": duration_min, "seed": seed, "tensor_parallel": tensor_parallel}
    result.write({**setting, **report}, output)
    sys.exit(bool(report["failures"]))


def soak(
    duration_s: float, round_s: float, seed: int, say: Callable[[str], None], tensor_parallel: int = 1
) -> dict[str, Any]:
    """Soak the demo model; returns what happened, with `failures`: what must not have."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the engine's: client and server need a core too
    settings = {**SETTINGS, "tensor_parallel": tensor_parallel}
    arguments = ["--model-control-mode=explicit", f"--load-model={MODEL}"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "server.log")
        with serve_model(DEMO_MODEL, arguments=arguments, log=log, **settings) as server:
            client = SoakClient(server, seed)
            capacity, broken = 0.0, None
            rounds: list[dict[str, Any]] = []
            kills = [client.faults.kill_engine, *([client.faults.kill_rank] if tensor_parallel > 1 else [])]
            try:
                capacity = client.capacity(SETTINGS["max_running"], min(10.0, round_s))
                say(f"capacity: {capacity:.1f} requests/s")
                rounds += _rounds(client, server, capacity, duration_s, round_s, say, kills)
            except Exception as error:  # the server is gone, most likely: what happened before is still worth having
                broken = f"{type(error).__name__}: {error}; the log ends: {log.read_text()[-2000:]}"
            finally:
                client.close()
    return _report(client, capacity, rounds, broken)


def _rounds(
    client: SoakClient,
    server: EmbeddedServer,
    capacity: float,
    duration_s: float,
    round_s: float,
    say: Callable[[str], None],
    kills: Sequence[Callable[[], None]],
) -> Iterable[dict[str, Any]]:
    rate = OVERLOAD * capacity * sum(MIX.values()) / MIX["plain"]  # plain requests alone are twice the capacity
    start_s = time.monotonic()
    for number, (event, cancels) in enumerate(_plan(client, start_s, duration_s, kills)):
        client.round(round_s, rate, event, cancels)
        ends = {how: client.ledger.count(how) for how in sorted({how for _, how in client.ledger.ends})}
        yield {
            "round": number,
            "event": event.__name__ if event else None,
            "cancels": cancels,
            "load_average": round(os.getloadavg()[0], 1),
            "held": server_state.sample(server),
            "departures": client.departures,
            "ends_so_far": ends,
            "server_requests": server_requests(server),
            "client_requests": sum(client.ledger.ends.values()) + client.probes,
        }
        say(f"round {number} ({event.__name__ if event else 'load'}): {ends}; faults: {client.ledger.faults[-3:]}")


def _plan(
    client: SoakClient, start_s: float, duration_s: float, kills: Sequence[Callable[[], None]]
) -> Iterator[tuple[Callable[[], None] | None, bool]]:
    """(event, whether calls are cancelled) of each round: half of the time each, and all kinds at least once.

    Where only kills are left, they come seldom enough for an engine to count as stable between them.
    """
    faults = client.faults
    all_kinds = (None, *kills, faults.reload, faults.pause_engine, faults.stall_engine)
    halves = [
        (start_s + duration_s / 2, all_kinds, False),
        (start_s + duration_s, [kind for kill in kills for kind in (None, kill, None, None)], True),
    ]
    for until_s, events, cancels in halves:
        yield from ((event, cancels) for event in dict.fromkeys(events))
        for event in itertools.cycle(events):
            if time.monotonic() > until_s:
                break
            yield event, cancels


def server_requests(server: EmbeddedServer) -> int:
    """Requests that the server says it has ended, well or not."""
    now = server_state.metrics(server, MODEL)
    return int(now["nv_inference_request_success"] + now["nv_inference_request_failure"])


def _report(client: SoakClient, capacity: float, rounds: list[dict[str, Any]], broken: str | None) -> dict[str, Any]:
    refusals = client.ledger.refusals
    p50, p99 = np.percentile([r.after_ms for r in refusals], [50, 99]).tolist() if refusals else (0.0, 0.0)
    growth = {name: _growth([r["held"][name] for r in rounds]) for name in (rounds[0]["held"] if rounds else ())}
    failures = [*([broken] if broken else []), *client.ledger.faults, *client.not_ready]
    failures += [f"{name} grew from {old} to {new}" for name, (old, new) in growth.items() if _leaks(name, old, new)]
    failures += list(itertools.islice(lost_too_much(rounds), 1))  # what is lost stays so in all later rounds
    if p99 > MAX_REFUSAL_P99_MS:
        failures.append(f"p99 of refusals: {p99:.0f} ms")
    if client.ledger.late_ms and (latest_ms := max(client.ledger.late_ms)) > MAX_LATE_MS:
        failures.append(f"late: {latest_ms:.0f} ms after its timeout a request ended")
    if rounds and not client.ledger.count(ANSWERED):
        failures.append("no request was answered")
    failures += [_miscount(client, last) for last in rounds[-1:] if _miscount(client, last)]
    return {
        "settings": SETTINGS,
        "overload": OVERLOAD,
        "capacity_requests_per_s": round(capacity, 1),
        "requests": sum(client.ledger.ends.values()),
        "ends": {f"{kind}: {how}": number for (kind, how), number in sorted(client.ledger.ends.items())},
        "refusals": len(refusals),
        "refusal_ms_p50": round(p50, 1),
        "refusal_ms_p99": round(p99, 1),
        "slowest_refusals": [(round(r.after_ms), r.message) for r in sorted(refusals)[-5:]],
        "latest_after_timeout_ms": round(max(client.ledger.late_ms, default=0.0)),
        "recoveries_s": client.faults.recoveries_s,
        "stalls_s": client.faults.stalls_s,
        "departures": client.departures,
        "growth": growth,
        "failures": failures,
        "rounds": rounds,
    }


def lost_too_much(rounds: list[dict[str, Any]]) -> Iterator[str]:
    """The rounds after which more sockets were lost than the server's own fault explains."""
    for of_round in rounds:
        lost, departures = of_round["held"].get("lost_sockets", 0), of_round["departures"]
        if lost > (MAX_LOST_SOCKETS * departures + LOST_BY_CHANCE if departures else 0):
            yield f"round {of_round['round']}: {lost} sockets lost after {departures} clients had left"


def _miscount(client: SoakClient, last: dict[str, Any]) -> str:
    """Server and client count the same requests; some that a client gave up the server may never have read."""
    unread = last["client_requests"] - last["server_requests"]
    if 0 <= unread <= client.ledger.count(DISCONNECTED, CANCELLED):
        return ""
    return f"the client counts {last['client_requests']} requests, the server {last['server_requests']}"


def _growth(values: list[float]) -> tuple[float, float]:
    third = max(1, len(values) // 3)
    return round(median(values[:third]), 2), round(median(values[-third:]), 2)


def _leaks(name: str, old: float, new: float) -> bool:
    limit = next((limit for suffix, limit in MAX_GROWTH.items() if name.endswith(suffix)), None)
    return new - old > (MAX_RSS_GROWTH * old + ALLOCATOR_MIB if limit is None else limit)
