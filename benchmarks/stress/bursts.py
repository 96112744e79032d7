"""Bursts of streams, more than the queue takes, through tritonclient: every request must end once, and the server live.

The engine's program does nothing, so that what is loaded is the server and our model in it. Each client reads its
stream to the end, as examples/README.md asks of clients.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.engine import null_engine
from benchmarks.server import DEMO_MODEL, serve_model
from benchmarks.serving import server_state
from nanoflow_backend.bench import result
from nanoflow_backend.commands.demo import stream_grpc
from nanoflow_backend.embedded.server import EmbeddedServer, ServerError

MODEL = "nanoflow"
SETTINGS: dict[str, Any] = {"max_running": 8, "max_queue_size": 16, "dense_batch_tokens": 256, "kv_cache_tokens": 8192}
STEP_US = 2000
MAX_TOKENS = 32
PATIENCE_S = 30.0
ANSWERED, REFUSED = ENDS = "answered", "refused: the queue is full"


def main(
    bursts: int = 300,
    streams: Annotated[int, typer.Option(help="Clients of a burst, each with a stream of its own.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
) -> None:
    """Bursts of streams that are more than the queue takes; exits with 1 if anything failed."""
    report = send(bursts, streams, functools.partial(print, flush=True))
    result.write(report, output)
    sys.exit(bool(report["failures"]))


def send(bursts: int, streams: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns what became of the requests, with `failures`: what must not have."""
    ends: Counter[str] = Counter()
    alive, failures = 0, []
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(streams) as clients:
        python = null_engine.write_interpreter(Path(folder, "python"), STEP_US)
        with serve_model(DEMO_MODEL, python=str(python), device="cpu", **SETTINGS) as server:
            try:
                while alive < bursts:
                    ends.update(clients.map(functools.partial(_client, server.grpc_url), range(streams)))
                    server.wait(timeout_s=0.05)  # raises where it has ended
                    alive += 1
                    if alive % 50 == 0:
                        say(f"{alive} bursts: {dict(ends)}")
                _wait_until_idle(server)
            except (ServerError, TimeoutError, OSError) as error:
                failures.append(f"after {alive} bursts: {error}")
    failures += [f"{count} requests ended so: {how}" for how, count in ends.items() if how not in ENDS]
    failures += [f"no request ended so: {how}" for how in ENDS if how not in ends]
    return {
        "settings": SETTINGS,
        "step_us": STEP_US,
        "max_tokens": MAX_TOKENS,
        "streams": streams,
        "bursts": bursts,
        "bursts_alive": alive,
        "minutes": round((time.monotonic() - start_s) / 60, 1),
        "load_average": round(os.getloadavg()[0], 1),
        "requests": sum(ends.values()),
        "ends": dict(sorted(ends.items())),
        "failures": failures,
    }


def _client(url: str, number: int) -> str:
    """How a request ended, whose client reads its stream to the end."""
    try:
        responses = list(stream_grpc(url, f"The {number}th statement", max_tokens=MAX_TOKENS, ignore_eos=True))
    except RuntimeError as error:
        return REFUSED if "as many as max_queue_size allows" in str(error) else f"error: {error}"
    tokens = sum(new for _, new in responses)
    return ANSWERED if tokens == MAX_TOKENS else f"{tokens} of {MAX_TOKENS} tokens"


def _wait_until_idle(server: EmbeddedServer) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while any(
        server_state.metrics(server, MODEL)[f"nanoflow_num_requests_{state}"] for state in ("running", "waiting")
    ):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the engine still had work {PATIENCE_S:g} s after the last burst")
        time.sleep(0.1)
