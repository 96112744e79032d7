"""`nanoflow bench plot`: how much of the device an offline run used, second by second (as the paper's Fig. 10); or
latencies of open loops over their rates (as its Fig. 8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from nanoflow_backend.bench.online.rates_plot import draw_rates
from nanoflow_backend.bench.result import labelled
from nanoflow_backend.config.error import ConfigError

COLOURS = {"compute": "#2a78d6", "memory bandwidth": "#d1602b", "power": "#6b8f2a"}


class Utilisation(NamedTuple):
    """Of one interval of a run, in 1 of what the same run measured as the most; power in 1 of the device's limit."""

    start_s: float
    end_s: float
    compute: float  # FLOPs of the model's products and attention
    memory: float  # bytes that must be read: all weights once a step, and the context of decodes
    power: float | None  # None where it was not measured


def bench_plot(runs: Sequence[Path], output: Path) -> None:
    """Raises: ConfigError for files that are no such results, or without matplotlib."""
    results = {run: _read(run) for run in runs}
    if all("rates" in result for result in results.values()):
        draw_rates({_name(run, results): result for run, result in results.items()}, output, _figure_class())
        return
    run, *others = runs
    if others:
        raise ConfigError(f"{others[0]}: expected one result of nanoflow bench offline, or some of bench online --rate")
    try:
        if "runs" in results[run]:
            raise ConfigError(f"{run}: expected a result of one workload, got {len(results[run]['runs'])}")
        intervals = utilisation(results[run])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run}: expected a result of nanoflow bench offline: {error!r}") from None
    draw(results[run], intervals, output)


def _read(run: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(run.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{run}: expected a result of nanoflow bench offline: {error!r}") from None


def _name(run: Path, results: Mapping[Path, Mapping[str, Any]]) -> str:
    """The engine of a result; its file's name, where others have the same engine."""
    engines = [result["engine"] for result in results.values()]
    engine = str(results[run]["engine"])
    return engine if engines.count(engine) == 1 else run.stem


def _figure_class() -> Callable[..., Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("matplotlib is not installed: pip install 'nanoflow-triton[plot]'") from None
    return Figure


def utilisation(result: dict[str, Any]) -> list[Utilisation]:
    """By tokens counted and rates that were measured: the driver's percentages say only that a GPU is busy."""
    work, found = result["work"], []
    for point in result["timeline"]:
        tokens = point["prefill_tokens"] + point["decode_tokens"]
        fp8_flop = tokens * work.get("fp8_flop_per_token", 0)  # older results have none
        flop = (
            tokens * work["linear_flop_per_token"]
            - fp8_flop
            + point["sampled_rows"] * work["head_flop_per_row"]
            + point["attended_pairs"] * work["attention_flop_per_pair"]
        )
        compute_s = flop / result["gemm"]["per_s"] + (fp8_flop / result["gemm_fp8"]["per_s"] if fp8_flop else 0.0)
        read_bytes = point["steps"] * work["weight_bytes"] + point["kv_tokens_read"] * work["kv_bytes_per_token"]
        power = point["power_w"] / result["gpu_power_limit_w"] if "power_w" in point else None
        found.append(
            Utilisation(
                point["at_s"] - point["wall_s"],
                point["at_s"],
                compute_s / point["wall_s"],
                read_bytes / (result["memory"]["per_s"] * point["wall_s"]),
                power,
            )
        )
    return found


def draw(result: dict[str, Any], intervals: list[Utilisation], output: Path) -> None:
    """Write the picture. Raises: ConfigError, matplotlib is not installed."""
    edges = [intervals[0].start_s, *(interval.end_s for interval in intervals)]
    columns = {
        "compute": [interval.compute for interval in intervals],
        "memory bandwidth": [interval.memory for interval in intervals],
    }
    powers = [interval.power for interval in intervals if interval.power is not None]
    if len(powers) == len(intervals):
        columns["power"] = powers
    figure = _figure_class()(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, values in columns.items():
        axes.stairs([100 * value for value in values], edges, baseline=None, color=COLOURS[name], label=name, lw=1.5)
    steady = result["steady"]
    if isinstance(steady, dict):
        axes.axvspan(steady["from_s"], steady["from_s"] + steady["wall_s"], color="0.93", label="stationary", zorder=0)
    axes.set(
        xlabel="seconds",
        ylabel="% of what the device reaches",
        xlim=(edges[0], edges[-1]),
        ylim=(0, None),
        title=labelled(
            f"{result['model']}, {result['workload']}, {result['schedule']}: "
            f"{result['total_tokens_per_s']:,.0f} tokens/s on {result.get('gpu', result['device'])}",
            result,
        ),
    )
    axes.title.set_fontsize(10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, ncols=4, loc="outside lower center", fontsize=9)
    figure.savefig(output)
