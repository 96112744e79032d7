"""summarise says of conversations that were driven through an engine: rounds a second, tokens by tier, first tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nanoflow_backend.bench.multi_round.bound import Bound
from nanoflow_backend.bench.multi_round.driver import AnsweredRound, Driver
from nanoflow_backend.bench.online.latency import percentiles_ms


def summarise(driver: Driver, bound: Callable[[Sequence[AnsweredRound]], Bound] | None = None) -> dict[str, Any]:
    """Of the whole run, and of its steady part: after the first rounds of all active conversations, and until the last
    conversation begins, or the run is cut. At least one round has ended.

    Rates are in seconds of the engine's clock. `bound` says what could be reached on some of the rounds: those of the
    steady part are not the same mix as all.
    """
    rounds = driver.answered
    from_s, until_s = rounds[: driver.active][-1].ended_s, driver.steady_until_s
    steady = [answered for answered in rounds if from_s < answered.ended_s <= until_s]
    whole = _part(rounds, rounds[-1].ended_s - driver.began_s, bound)
    return {
        "active_conversations": driver.active,
        **whole,
        "steady": _part(steady, until_s - from_s, bound)
        if steady
        else "too few conversations: none began after the first",
    }


def _part(
    rounds: Sequence[AnsweredRound], seconds: float, bound: Callable[[Sequence[AnsweredRound]], Bound] | None
) -> dict[str, Any]:
    prompts, cached = sum(r.prompt_tokens for r in rounds), sum(r.cached_tokens for r in rounds)
    host, disk = sum(r.host_tokens for r in rounds), sum(r.disk_tokens for r in rounds)
    rate, most = len(rounds) / seconds, bound(rounds) if bound else None
    returning = [r.first_token_s - r.sent_s for r in rounds if r.number]
    first = [r.first_token_s - r.sent_s for r in rounds if not r.number]
    return {
        "rounds": len(rounds),
        "wall_s": round(seconds, 3),
        "rounds_per_s": round(rate, 3),
        **({"bound": most.facts(), "share_of_bound": round(rate / most.rounds_per_s, 4)} if most else {}),
        "output_tokens_per_s": round(sum(r.output_tokens for r in rounds) / seconds, 1),
        "prompt_tokens": {
            "all": prompts,
            "computed": prompts - cached,
            "device": cached - host - disk,
            "host": host,
            "disk": disk,
        },
        "cached_share": round(cached / prompts, 4),
        "first_token_ms": {
            "first_rounds": percentiles_ms(first) if first else None,
            "returning_rounds": percentiles_ms(returning) if returning else None,
        },
    }
