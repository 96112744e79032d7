"""The metrics page is read every 50 ms while requests come and go: how old are its gauges, and what do they cost?

The engine is a null engine that keeps each of its loads with the time; an age is how long a value was not true any more
when a scrape asked for it. What it costs is the CPU time of the engine process and of the stub, against the same
requests where the engine tells no loads and the server has no metrics; both are measured in turns.

Client, server, stub and engine share the machine's cores.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from benchmarks.engine import null_engine
from benchmarks.engine.load_history import LoadHistory
from benchmarks.server import DEMO_MODEL, serve_model
from benchmarks.serving import server_state, streaming
from benchmarks.serving.grpc_streams import GrpcStreams
from nanoflow_backend.bench import result
from nanoflow_backend.embedded.server import EmbeddedServer

RUNNING, PAGE_TOKENS, PAGES = 16, 16, 400
SETTINGS = {"max_running": RUNNING, "page_tokens": PAGE_TOKENS, "kv_cache_tokens": PAGE_TOKENS * PAGES}
TOKENS = (20, 180)  # least and most of an answer
STEP_US, RATE = 8000, 18.0  # some 90 % of what the engine can do, so that the queue comes and goes
LIMIT_MS = 50.0
# Of the page: the column of the engine's loads, and by how much a value is scaled to be one.
GAUGES = {
    "nanoflow_num_requests_running": ("running", 1),
    "nanoflow_num_requests_waiting": ("waiting", 1),
    "nanoflow_kv_cache_usage_perc": ("used_pages", PAGES),
    "vllm:num_requests_running": ("running", 1),
    "vllm:num_requests_waiting": ("waiting", 1),
    "vllm:kv_cache_usage_perc": ("used_pages", PAGES),
    'nv_trt_llm_request_metrics{request_type="waiting"}': ("waiting", 1),
    'nv_trt_llm_request_metrics{request_type="scheduled"}': ("running", 1),
    'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used"}': ("used_pages", 1),
    'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction"}': ("used_pages", PAGES),
    'nanoflow_kv_cache_pages{state="used"}': ("used_pages", 1),  # twice a second is enough for this one
}
STATS_AGE = "nanoflow_stats_age_seconds"


class Scrape(NamedTuple):
    """One reading of the page. Times are of `time.monotonic()`."""

    asked_s: float
    answered_s: float
    page: str


def main(
    output: Annotated[Path | None, typer.Option(help="Where the JSON result goes; default: standard output.")] = None,
    model: Annotated[Path, typer.Option(help="Hugging Face folder.")] = DEMO_MODEL,
    duration_s: Annotated[float, typer.Option(help="Of all scrapes; it takes twice as long.")] = 600.0,
    period_ms: Annotated[float, typer.Option(help="From one scrape to the next.")] = 50.0,
    dialects: Annotated[str, typer.Option(help="As in engine.json.")] = "nanoflow,vllm",
    rounds: Annotated[int, typer.Option(help="Of both arms, A B B A ...")] = 4,
) -> None:
    """How old the gauges of the metrics page are when it is read every 50 ms, and what that costs."""
    load_before = os.getloadavg()[0]
    ages: dict[str, list[float]] = {}
    changes: dict[str, int] = {}
    scrapes: list[Scrape] = []
    used: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    arms = [arm for number in range(rounds) for arm in (("without", "with") if number % 2 else ("with", "without"))]
    for number, arm in enumerate(arms):
        # Both arms of a round have the same requests.
        rng = random.Random(number // 2)
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), model, arm == "with", dialects) as server:
            scraper = Scraper(server, period_ms / 1e3 if arm == "with" else None)
            used[arm].append(drive(server, scraper, duration_s / rounds, rng))
            scrapes += scraper.scrapes
            if arm == "with":
                measure_ages(Path(folder) / "loads", scraper.scrapes, ages, changes)
        print(f"{arm}: {used[arm][-1]}", flush=True)
    cpu = {arm: mean_percent(of_arm) for arm, of_arm in used.items()}
    result.write(
        {
            "seconds_of_scrapes": duration_s,
            "period_ms": period_ms,
            "dialects": dialects.split(","),
            "step_us": STEP_US,
            "max_running": RUNNING,
            "requests_per_s": RATE,
            "load_average_before": round(load_before, 2),
            "scrapes": len(scrapes),
            "scrape_ms": percentiles_ms([scrape.answered_s - scrape.asked_s for scrape in scrapes]),
            "page": {"bytes": len(scrapes[-1].page), "series": len(re.findall(r"^\w", scrapes[-1].page, re.M))},
            "stats_age_s_most": max(values(scrape.page, STATS_AGE)[0] for scrape in scrapes),
            "gauges": {
                name: {
                    "changes_per_s": round(changes[name] / duration_s, 1),
                    "age_ms": percentiles_ms(of_one),
                    "within_50_ms": round(float(np.mean(np.array(of_one) * 1e3 <= LIMIT_MS)), 5),
                }
                for name, of_one in ages.items()
            },
            "cpu_percent_of_a_core": cpu
            | {"more": {role: round(cpu["with"][role] - cpu["without"][role], 2) for role in cpu["with"]}},
        },
        output,
    )


@contextlib.contextmanager
def serving(folder: Path, model: Path, with_metrics: bool, dialects: str) -> Iterator[EmbeddedServer]:
    """A null engine that keeps its loads in the folder."""
    record = f"record({str(folder / 'loads')!r}, tells={with_metrics})"
    first = f"from benchmarks.engine import load_history; load_history.{record}"
    python = null_engine.write_interpreter(folder / "python", STEP_US, first)
    arguments = [] if with_metrics else ["--allow-metrics=false"]
    settings: dict[str, Any] = {**SETTINGS, "metrics_dialects": dialects.split(",")}
    with serve_model(model, arguments=arguments, python=str(python), device="cpu", **settings) as server:
        yield server


class Scraper:
    """Reads the page every `period_s` on a thread of its own; None: never."""

    def __init__(self, server: EmbeddedServer, period_s: float | None) -> None:
        self.scrapes: list[Scrape] = []
        self._url, self._period_s = server.metrics_url, period_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scraper")

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        if self._period_s is None:
            return
        with contextlib.closing(http.client.HTTPConnection(self._url, timeout=30)) as connection:
            due_s = time.monotonic()
            while not self._stopping.wait(max(0.0, due_s - time.monotonic())):
                asked_s = time.monotonic()
                connection.request("GET", "/metrics")
                page = connection.getresponse().read().decode()
                self.scrapes.append(Scrape(asked_s, time.monotonic(), ours(page)))
                due_s = max(due_s + self._period_s, asked_s)


def ours(page: str) -> str:
    """The lines of our metrics, without their descriptions: ten minutes of whole pages would be gigabytes."""
    return "\n".join(re.findall(r"^(?:nanoflow_|vllm:|nv_trt_llm_)(?!\w+_bucket|\w+_sum|\w+_count).*", page, re.M))


def values(page: str, name: str) -> list[float]:
    """Of all series of a name that have its label, if it names one."""
    bare, _, label = name.partition("{")
    lines = re.findall(rf"^{re.escape(bare)}{{(.*)}} (\S+)$", page, re.M)
    return [float(value) for labels, value in lines if label.rstrip("}") in labels]


def drive(server: EmbeddedServer, scraper: Scraper, seconds: float, rng: random.Random) -> dict[str, float]:
    """Requests that come at random times (Poisson); returns what each process used, in per cent of a core."""
    with GrpcStreams(server.grpc_url) as client:
        idle: list[int] = []
        live: set[int] = set()

        def receive(until_s: float) -> None:
            for stream, answer in client.receive(until_s):
                assert not answer.error_message, answer.error_message
                if answer.infer_response.parameters["triton_final_response"].bool_param:
                    live.remove(stream)
                    idle.append(stream)

        def offer(until_s: float) -> None:
            due_s = time.monotonic()
            while (due_s := due_s + rng.expovariate(RATE)) < until_s:
                receive(due_s)
                live.add(stream := idle.pop() if idle else client.open())
                params = {"max_tokens": rng.randint(*TOKENS), "temperature": 0, "ignore_eos": True}
                client.send(stream, streaming.request("nanoflow", stream, params))
            receive(until_s)

        offer(time.monotonic() + min(5.0, seconds / 4))  # a warm-up
        with scraper:
            before, begun_s = server_state.cpu_s(server), time.monotonic()
            offer(begun_s + seconds)
            after, took_s = server_state.cpu_s(server), time.monotonic() - begun_s
        streaming.drain(client, live)
    return {role: round(100 * (after[role] - before[role]) / took_s, 2) for role in after}


def measure_ages(loads: Path, scrapes: list[Scrape], ages: dict[str, list[float]], changes: dict[str, int]) -> None:
    """Add the age in seconds of each value on each page, and how often each gauge changed meanwhile."""
    for name, (column, scale) in GAUGES.items():
        if not values(scrapes[0].page, name):
            continue  # of a dialect that is not shown
        history = LoadHistory(loads, column)
        changes[name] = changes.get(name, 0) + history.changes(scrapes[0].asked_s, scrapes[-1].asked_s)
        for scrape in scrapes:
            (value,) = values(scrape.page, name)
            ages.setdefault(name, []).append(history.age_s(round(value * scale), scrape.asked_s, scrape.answered_s))


def mean_percent(runs: list[dict[str, float]]) -> dict[str, float]:
    return {role: round(float(np.mean([run[role] for run in runs])), 2) for role in runs[0]}


def percentiles_ms(seconds: list[float]) -> dict[str, float]:
    cuts = np.percentile(np.array(seconds) * 1e3, (50, 99, 99.9, 100))
    return {name: round(float(cut), 1) for name, cut in zip(("p50", "p99", "p99.9", "max"), cuts, strict=True)}
