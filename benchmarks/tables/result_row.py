"""ResultRow, one line of a table, and the phrases that several rows use."""

from __future__ import annotations

from typing import Any, NamedTuple


class ResultRow(NamedTuple):
    """One line of a table, in words."""

    what: str
    measured: str
    hardware: str


def requests(run: dict[str, Any]) -> str:
    count = f"{run['requests']:,} requests at once{precision(run)}"
    return f"{run['model']} with random weights, {run['workload']} tokens in and out, {count}"


def rates(run: dict[str, Any]) -> str:
    share = f"; {run['share_of_eq5']:.0%} of Eq. 5" if "share_of_eq5" in run else ""
    power = f"{run['mean_power_w']:.0f} W, {run['mj_per_token']:.1f} mJ a token"
    return f"{run['total_tokens_per_s']:,.0f} tokens/s; {power}{share}"


def precision(run: dict[str, Any]) -> str:
    weights = ", weights in FP8" if run.get("quantization") else ""
    return weights + (", KV cache in FP8" if run.get("kv_cache_dtype") == "fp8_e4m3" else "")


def span(cells: list[dict[str, Any]], name: str) -> str:
    values = [cell[name] for cell in cells]
    return f"{min(values):,} to {max(values):,}"


def told(cell: dict[str, Any]) -> str:
    return f"{cell['over_sequential']:.3f}x ({cell['tokens']:,} tokens, context {cell['context']:,})"


def medians(levels: list[dict[str, Any]], times: str) -> str:
    return " / ".join(f"{level[times]['p50']:,.1f}" for level in levels)


def at_each(rates: list[dict[str, Any]], field: str, part: str | None = None) -> str:
    """A figure of each rate; "-" where no request had one."""
    figures = [rate[field].get(part) if part else rate[field] for rate in rates]
    return " / ".join("-" if figure is None else f"{figure:.1f}" for figure in figures)
