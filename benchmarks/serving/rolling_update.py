"""Three servers behind one entry are stopped and replaced, one after the other, while clients go on asking.

Each server is a tritonserver of its own with a null engine. It is stopped by SIGTERM, as a pod is, with nobody told
before: what runs there ends, and what it takes no more goes elsewhere. Every request must have its whole answer, and
each server its share of them while all three serve.

Clients, balancer and servers share the machine's cores.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.engine import null_engine
from benchmarks.server import DEMO_MODEL, add_model
from benchmarks.serving.balancer import Balancer, Lost
from nanoflow_backend.bench import result
from nanoflow_backend.embedded.server import EmbeddedServer

SERVERS = ("a", "b", "c")
STEP_US, TOKENS = 8000, (20, 180)  # of an engine; least and most of an answer
SETTINGS = {"max_running": 16, "page_tokens": 16, "kv_cache_tokens": 16 * 400}
CLIENTS = 36
EXIT_TIMEOUT_S = 60
SETTLING_S = 2.0  # until a new server has its share of what runs
LIMIT = 0.2  # of the mean, by which a server's share may differ


class Ended(NamedTuple):
    """One request: who answered, and when it ended, in seconds of `time.monotonic()`. `lost`: why it has no answer."""

    server: str
    ended_s: float
    lost: str | None = None


def main(
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")] = DEMO_MODEL,
    phase_s: Annotated[float, typer.Option(help="With all servers: before, after and between the replacements.")] = 30,
    clients: Annotated[int, typer.Option(help="Each sends its next request when the last was answered.")] = CLIENTS,
) -> None:
    """What becomes of requests while three servers behind a balancer are replaced one after the other."""
    load_before = os.getloadavg()[0]
    ended: list[Ended] = []
    stopping = threading.Event()
    drained_s, started_s, complete = [], [], []  # the last: spans in which all servers served
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running, Balancer(SERVERS, "nanoflow") as balancer:
        repository = write_repository(Path(folder), model)
        servers = {name: running.enter_context(start(repository)) for name in SERVERS}
        for name in SERVERS:
            balancer.serve(name, servers[name])
        balancer.wait_until_ready()
        threads = [threading.Thread(target=ask, args=(balancer, seed, ended, stopping)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for name in (*SERVERS, None):
            begun_s = time.monotonic()
            time.sleep(SETTLING_S + phase_s)
            complete.append((begun_s + SETTLING_S, time.monotonic()))
            if name is None:
                break
            servers[name].stop()
            stopped_s = time.monotonic()
            drained_s.append(round(stopped_s - complete[-1][1], 1))
            balancer.serve(name, running.enter_context(start(repository)))
            balancer.wait_until_ready()
            started_s.append(round(time.monotonic() - stopped_s, 1))
            print(f"{name}: drained in {drained_s[-1]} s, ready again after {started_s[-1]} s", flush=True)
        stopping.set()
        for thread in threads:
            thread.join()
    shares = [share_of_each(ended, *span) for span in complete]
    result.write(
        {
            "servers": len(SERVERS),
            "clients": clients,
            "step_us": STEP_US,
            "max_running": SETTINGS["max_running"],
            "phase_s": phase_s,
            "load_average_before": round(load_before, 2),
            "requests": len(ended),
            "lost": Counter(request.lost for request in ended if request.lost),
            "retried_elsewhere": balancer.retried,
            "longest_without_an_answer_s": longest_gap_s(ended),
            "drained_s": drained_s,
            "started_s": started_s,
            "share_of_each": shares,
            "furthest_from_mean": max(spread(share) for share in shares),
        },
        output,
    )


def write_repository(folder: Path, model: Path) -> Path:
    """One for all servers: a model with a null engine."""
    python = null_engine.write_interpreter(folder / "python", STEP_US)
    add_model(folder / "repository", model, python=str(python), device="cpu", **SETTINGS)
    return folder / "repository"


def start(repository: Path) -> EmbeddedServer:
    return EmbeddedServer(repository, exit_timeout_s=EXIT_TIMEOUT_S)


def ask(balancer: Balancer, seed: int, ended: list[Ended], stopping: threading.Event) -> None:
    """A client: one request after the other, each of random length."""
    rng = random.Random(seed)
    while not stopping.is_set():
        tokens = rng.randint(*TOKENS)
        body: dict[str, Any] = {"text_input": f"The {seed}th statement", "max_tokens": tokens, "ignore_eos": True}
        try:
            server, answer = balancer.ask({**body, "return_num_output_tokens": True})
        except Lost as lost:
            ended.append(Ended("nobody", time.monotonic(), str(lost)))
            continue
        whole = answer["num_output_tokens"] == tokens
        ended.append(Ended(server, time.monotonic(), None if whole else f"{server}: an answer that is not whole"))


def share_of_each(ended: list[Ended], from_s: float, until_s: float) -> dict[str, float]:
    """Of the answers in a span of time, the share of each server."""
    counts = Counter(request.server for request in ended if from_s <= request.ended_s < until_s)
    return {name: round(counts[name] / counts.total(), 4) for name in SERVERS}


def spread(share: dict[str, float]) -> float:
    """How far the furthest is from the mean, over the mean."""
    return round(max(abs(one * len(share) - 1) for one in share.values()), 4)


def longest_gap_s(ended: list[Ended]) -> float:
    """In which no request of any client was answered."""
    times = sorted(request.ended_s for request in ended)
    return round(max((after - before for before, after in pairwise(times)), default=0.0), 2)
