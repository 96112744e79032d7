"""bench_online is `nanoflow bench online`: a closed loop at each concurrency, or an open loop at each rate."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nanoflow_backend.bench import result, workload
from nanoflow_backend.bench.online.arrivals import Load
from nanoflow_backend.bench.online.closed_loop import run_level, single_stream
from nanoflow_backend.bench.online.engine_target import EngineTarget
from nanoflow_backend.bench.online.latency import PERCENTILES, Limits
from nanoflow_backend.bench.online.open_loop import measure_rates
from nanoflow_backend.bench.online.server_target import ServerTarget
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.offline.output import check_output

SHOWN = (
    ("goodput, requests/s", "goodput_per_s", None),
    ("output tokens/s", "output_tokens_per_s", None),
    *((f"first token {part}, ms", "first_token_ms", part) for part in ("p50", "p99")),
    *((f"between tokens {part}, ms", "between_tokens_ms", part) for part in ("p50", "p99")),
    ("normalized latency, mean, ms", "normalized_latency_ms", "mean"),
    ("in flight, at the begin", "in_flight", "begin"),
    ("in flight, at the end", "in_flight", "end"),
    ("sent late, at most, ms", "lateness_ms", "max"),
)
UNLIMITED = 10**6  # requests that may wait in the engine: an open loop is not held up


def bench_online(
    model: Path,
    output: Path | None,
    rates: Sequence[float],
    input_tokens: int,
    output_tokens: int,
    open_loop: Mapping[str, Any],
    closed_loop: Mapping[str, Any],
    *,
    settings: Sequence[str],
) -> None:
    """An open loop where there are rates or the arrivals of a trace. `open_loop` and `closed_loop` are options of one
    of them alone, by name; None was not given.

    Raises:
        ConfigError: options of the other loop are given; or as either of the two.
    """
    is_open = bool(rates) or open_loop["arrivals"] == "trace"
    for option, value in (closed_loop if is_open else open_loop).items():
        if value is not None:
            raise ConfigError(f"--{option}: expected {'none beside --rate' if is_open else '--rate beside it'}")
    if not is_open:
        requests, concurrency = closed_loop["requests"] or 32, closed_loop["concurrency"] or [1, 16, 64, 256]
        bench_closed_loop(model, output, input_tokens, output_tokens, requests, concurrency, settings)
        return
    given = {option: value for option, value in open_loop.items() if value is not None}
    (spec,) = workload.asked_for([], given.get("trace"), given.get("dataset"), (input_tokens, output_tokens), 1)
    load = Load(
        tuple(rates),
        given.get("warm-up", 10.0),
        given.get("duration", 60.0),
        spec.source,
        given.get("arrivals", "poisson"),
        given.get("seed", 0),
    )
    limits = Limits(given.get("ttft-limit"), given.get("itl-limit"))
    url, served_model = given.get("url"), given.get("served-model")
    bench_open_loop(model, output, load, limits, url=url, served_model=served_model, settings=settings)


def bench_closed_loop(
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
    _show_levels(found["levels"])
    if alone:
        rate, share = found["single_stream"]["tokens_per_s"], found["single_stream"]["share_of_bound"]
        print(f"one request alone: {rate:.1f} tokens/s, {share:.0%} of what reading the weights allows")
    if output:
        result.write({"workload": f"{input_tokens}/{output_tokens}", **result.engine_facts(engine), **found}, output)
    engine.close()


def bench_open_loop(
    model: Path,
    output: Path | None,
    load: Load,
    limits: Limits,
    *,
    url: str | None,
    served_model: str | None,
    settings: Sequence[str],
) -> None:
    """Latency and goodput at each rate of a load: of an engine in this process, or of the server at `url`.

    Raises:
        ConfigError: options that do not go together, no such server, or an output that cannot be written.
    """
    if output:
        check_output(output)
    load.check()
    if served_model and not url:
        raise ConfigError("--served-model: expected --url beside it")
    if url and settings:
        raise ConfigError("--set: expected none beside --url: the server's engine has its own engine.json")
    if url:
        shape = read_model_config(model)
        target = ServerTarget(url, served_model or "nanoflow")
        facts = {"model": model.name, "engine": "nanoflow behind tritonserver", "schedule": "of the server"}
        measured = measure_rates(
            target, load, limits, vocab_size=shape.vocab_size, max_model_tokens=shape.max_model_tokens, tell=_tell
        )
    else:
        engine = make_engine(model, settings, max_queue_size=str(UNLIMITED))
        facts = result.engine_facts(engine)
        measured = measure_rates(
            EngineTarget(engine),
            load,
            limits,
            vocab_size=engine.model_config.vocab_size,
            max_model_tokens=engine.max_model_tokens,
            tell=_tell,
        )
        engine.close()
    _show_rates(measured["rates"])
    if output:
        result.write({**facts, **measured}, output)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show_levels(levels: Sequence[Mapping[str, Any]]) -> None:
    times = {"first token": "first_token_ms", "between": "between_tokens_ms"}
    table = Table("in flight", *(f"{what} p{p}, ms" for what in times for p in PERCENTILES))
    for level in levels:
        cells = (f"{ms:,.1f}" for field in times.values() for ms in level[field].values())
        table.add_row(str(level["concurrency"]), *cells)
    Console(highlight=False).print(table)


def _show_rates(rates: Sequence[Mapping[str, Any]]) -> None:
    """A column for each rate."""
    table = Table("requests/s", *(f"{rate['rate']:g}" for rate in rates))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, field, part in SHOWN:
        values = [rate.get(field, {}).get(part) if part else rate.get(field) for rate in rates]
        if any(value is not None for value in values):
            table.add_row(label, *map(_cell, values))
    Console(highlight=False).print(table)
    for rate in rates:
        for why, count in rate["failed"].items():
            print(f"{count} requests failed at {rate['rate']:g} a second: {why}")


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
