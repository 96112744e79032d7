"""draw_rates shows latencies and goodput of open loops over their rates, one line for each result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanoflow_backend.config.error import ConfigError

COLOURS = ("#2a78d6", "#d1602b", "#6b8f2a", "#8a4fbf", "#555555")


class Panel(NamedTuple):
    """One of the picture. `percentiles` of the field are lines of their own, the first solid; none: it is a number."""

    title: str
    field: str
    percentiles: tuple[str, ...] = ()


PANELS = (
    Panel("first token, ms", "first_token_ms", ("p50", "p99")),
    Panel("between tokens, ms", "between_tokens_ms", ("p50", "p99")),
    Panel("normalized latency, ms a token", "normalized_latency_ms", ("mean",)),
    Panel("goodput, requests/s", "goodput_per_s"),
)
STYLES = ("-", "--")


def curve(result: Mapping[str, Any], panel: Panel, percentile: str | None) -> tuple[list[float], list[float]]:
    """The rates of a result that have this figure, ascending, and the figures."""
    points = []
    for row in sorted(result["rates"], key=lambda row: row["rate"]):
        value = row.get(panel.field, {}).get(percentile) if percentile else row.get(panel.field)
        if value is not None:
            points.append((row["rate"], value))
    return [rate for rate, _ in points], [value for _, value in points]


def draw_rates(results: Mapping[str, Mapping[str, Any]], output: Path, figure_class: Callable[..., Any]) -> None:
    """Write the picture of results, by the name that the legend has for each. `figure_class`: matplotlib's Figure.

    A panel that no result has figures for, as goodput without limits, is left out.

    Raises:
        ConfigError: results of different workloads: their latencies do not compare.
    """
    workloads = {result["workload"] for result in results.values()}
    if len(workloads) > 1:
        raise ConfigError(f"expected results of one workload, got {', '.join(sorted(workloads))}")
    panels = [panel for panel in PANELS if any(panel.field in row for r in results.values() for row in r["rates"])]
    figure = figure_class(figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for (name, result), colour in zip(results.items(), _colours(len(results)), strict=True):
            for percentile, style in zip(panel.percentiles or (None,), STYLES, strict=False):
                label = name if percentile is None else f"{name}, {percentile}"
                axes.plot(*curve(result, panel, percentile), style, marker=".", color=colour, label=label, lw=1.4)
        axes.set(title=panel.title, xlabel="requests/s", ylim=(0, None))
        axes.title.set_fontsize(9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    first = next(iter(results.values()))
    figure.suptitle(
        f"{first['model']}, {first['workload']} tokens, on {first.get('gpu', first['device'])}", fontsize=10
    )
    figure.savefig(output)


def _colours(count: int) -> Sequence[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]
