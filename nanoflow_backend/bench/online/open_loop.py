"""run_open_loop sends requests when they are due, whatever has become of those before them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from nanoflow_backend.bench.online.arrivals import Arrivals, Load
from nanoflow_backend.bench.online.latency import Limits, Timed, open_loop_summary

Clock = Callable[[], float]
T = TypeVar("T")


class News(NamedTuple):
    """Of one request: tokens that came together, at a time of the driver's clock."""

    request: int
    time_s: float
    tokens: int
    ended: bool
    failed: str | None = None  # why there will be no more of it


class Target(Protocol):
    """What requests are sent to: an engine, or a server. Requests have numbers, and are greedy."""

    def send(self, request: int, prompt: list[int], output_tokens: int) -> None:
        """Returns without waiting for an answer. Why a request is refused is in its news."""
        ...

    def receive(self, until_s: float) -> Sequence[News]:
        """What has come since the last call. Waits for something, but not longer than to `until_s` of its clock."""
        ...

    def stop(self) -> None:
        """End all requests; those of the next run may have the same numbers."""
        ...


def what_came(queue: SimpleQueue[T], wait_s: float | None) -> list[T]:
    """All that is in a queue; waits for something, at most `wait_s` (None: as long as it takes)."""
    try:
        found = [queue.get(timeout=None if wait_s is None else max(wait_s, 0.0))]
    except Empty:
        return []
    while not queue.empty():
        found.append(queue.get())
    return found


def run_open_loop(
    target: Target, arrivals: Arrivals, prompts: Sequence[list[int]], clock: Clock = time.perf_counter
) -> tuple[list[Timed], float]:
    """Returns the requests that were sent, in their order, and when the run began. It ends with the last measured one.

    A request is sent late where the driver is held up: by a send, or by a step of an engine in its own thread. Its
    latency counts from when it was due.
    """
    start_s, sent, measured = clock(), list[Timed](), arrivals.measured
    running: set[int] = set(measured)
    while running:
        while len(sent) < len(prompts) and (due_s := start_s + arrivals.due_s[len(sent)]) <= (now_s := clock()):
            number, (_, output_tokens) = len(sent), arrivals.lengths[len(sent)]
            sent.append(Timed(due_s, now_s, output_tokens))
            target.send(number, prompts[number], output_tokens)
        next_s = start_s + arrivals.due_s[len(sent)] if len(sent) < len(prompts) else float("inf")
        for news in target.receive(next_s):
            request = sent[news.request]
            request.token_s += [news.time_s] * news.tokens
            if news.ended:
                running.discard(news.request)
                got, wanted = len(request.token_s), request.output_tokens
                short = f"{got} tokens, expected {wanted}" if got != wanted else None
                request.failed = news.failed or short
    target.stop()
    return sent, start_s


def measure_rates(
    target: Target,
    load: Load,
    limits: Limits,
    *,
    vocab_size: int,
    max_model_tokens: int,
    clock: Clock = time.perf_counter,
    tell: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """For a result: each rate of a load, one after the other; `tell` gets a line for people of each that is done.

    `driver_cpu_cores` is what this process used: of an engine in it, the engine too. A driver near one core is late
    with what it reads.

    Raises:
        ConfigError: as Load.arrivals.
    """
    rates = []
    for arrivals in load.arrivals(max_model_tokens):
        prompts = list(arrivals.prompts(vocab_size))
        gc.collect()
        gc.freeze()  # as the engine process does: a full collection would be in the times
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        requests, start_s = run_open_loop(target, arrivals, prompts, clock)
        cores = (time.process_time() - cpu_s) / (time.perf_counter() - wall_s)
        begin_s = start_s + load.warm_up_s
        window_s = begin_s, begin_s + load.duration_s
        found = open_loop_summary(requests, arrivals.measured, window_s, limits)
        rates.append({"rate": round(arrivals.rate, 4), **arrivals.facts, **found, "driver_cpu_cores": round(cores, 2)})
        normalized = found["normalized_latency_ms"].get("mean", "-")
        tell(f"{arrivals.rate:g} requests/s: {found['requests']} measured, normalized latency {normalized} ms")
    slo = {name: ms for name, ms in vars(limits).items() if ms is not None}
    return {**load.facts(), **({"slo": slo} if slo else {}), "rates": rates}
