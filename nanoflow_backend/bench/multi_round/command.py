"""`nanoflow bench multi-round` drives conversations that come back through an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from nanoflow_backend.bench import result
from nanoflow_backend.bench.host_memory import wait_for_host_memory
from nanoflow_backend.bench.multi_round.bound import Bound, StepCost
from nanoflow_backend.bench.multi_round.conversations import draw_conversations
from nanoflow_backend.bench.multi_round.driver import Driver
from nanoflow_backend.bench.multi_round.summary import summarise
from nanoflow_backend.bench.workload import Dataset
from nanoflow_backend.commands.settings import make_engine
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.output import check_output

WARM_UP_CONVERSATIONS = 4


def bench_multi_round(
    model: Path,
    output: Path | None,
    *,
    dataset: Dataset,
    conversations: int,
    active: int,
    think_s: float,
    scale: float,
    seed: int,
    limit_s: float,
    step_cost: str | None,
    settings: Sequence[str],
) -> None:
    """Rounds a second, and prompt tokens by the tier that had them.

    Raises:
        ConfigError: an option out of range, no round that ended in time, or an output that cannot be written.
    """
    if output:
        check_output(output)
    if active < 1:
        raise ConfigError(f"--active: expected 1 or more, got {active}")
    cost = StepCost.parse(step_cost) if step_cost else None
    engine = make_engine(model, settings, max_queue_size=str(active))
    drawn = draw_conversations(dataset, conversations, engine.max_model_tokens, think_s=think_s, scale=scale, seed=seed)
    warm_up = draw_conversations(
        dataset, WARM_UP_CONVERSATIONS, engine.max_model_tokens, think_s=0, scale=scale, seed=seed + 1
    )
    vocab_size = engine.model_config.vocab_size
    Driver(warm_up, 1, vocab_size, seed + 1).run(engine, time.perf_counter, time.sleep)
    engine.scheduler.forget_lengths()
    driver = Driver(drawn, active, vocab_size, seed)
    engine.drain()
    wait_for_host_memory(engine)
    driver.run(engine, time.perf_counter, time.sleep, limit_s)
    engine.cancel_all()
    engine.drain()
    if not driver.answered:
        raise ConfigError(f"--limit-s: expected more than the {limit_s:g} s in which no round has ended")
    kv_cache_tokens = engine.executor.num_pages * engine.config.page_tokens
    bound = partial(Bound.of, cost=cost, kv_cache_tokens=kv_cache_tokens) if cost else None
    measured = {"workload": drawn.name, **drawn.facts, "mean_context_tokens": round(drawn.mean_context_tokens, 1)}
    measured |= result.engine_facts(engine) | summarise(driver, bound)
    measured["scheduler"] = msgspec.to_builtins(engine.scheduler.stats)  # with the warm-up
    engine.close()
    _show(measured)
    if output:
        result.write(measured, output)


def _show(measured: Mapping[str, Any]) -> None:
    steady = measured["steady"]
    parts = {"whole run": measured, **({"steady": steady} if isinstance(steady, dict) else {})}
    table = Table("", *parts, title=f"{measured['rounds']} rounds of {measured['workload']}, {measured['model']}")
    for column in table.columns[1:]:
        column.justify = "right"
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "rounds/s": lambda part: f"{part['rounds_per_s']:,.2f}",
        "output tokens/s": lambda part: f"{part['output_tokens_per_s']:,.0f}",
        "prompt tokens": lambda part: f"{part['prompt_tokens']['all']:,}",
        "of these, computed": lambda part: f"{part['prompt_tokens']['computed']:,}",
        "of the device's cache": lambda part: f"{part['prompt_tokens']['device']:,}",
        "of host memory": lambda part: f"{part['prompt_tokens']['host']:,}",
        "of the disk": lambda part: f"{part['prompt_tokens']['disk']:,}",
        "first token of returning rounds, p50, ms": lambda part: _ms(part, "p50"),
        "first token of returning rounds, p99, ms": lambda part: _ms(part, "p99"),
    }
    if "share_of_bound" in measured:
        rows["of what is possible"] = lambda part: f"{part['share_of_bound']:.1%}"
    for label, value in rows.items():
        table.add_row(label, *(value(part) for part in parts.values()))
    console = Console(highlight=False)
    console.print(table)
    if isinstance(steady, str):
        console.print(f"steady part: {steady}", markup=False, soft_wrap=True)


def _ms(part: Mapping[str, Any], percentile: str) -> str:
    returning = part["first_token_ms"]["returning_rounds"]
    return f"{returning[percentile]:,.1f}" if returning else "-"
