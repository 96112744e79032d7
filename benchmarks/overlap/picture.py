"""These pictures show what ablation.py and sensitivity.py found: bars as in the paper's Fig. 9, or a map of gains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

ARMS = {"nano-batch only": "#8a8a8a", "overlap memory": "#2a78d6", "searched": "#6b8f2a"}
GAINS = LinearSegmentedColormap.from_list("gains", ["#8a8a8a", "#ffffff", "#3f9b4f"])  # grey: it does not pay
SPAN = 0.02  # of the colours at least, on either side of 1


def main(
    found: Annotated[Path, typer.Argument(metavar="RESULT", help="Of overlap-ablation or overlap-sensitivity.")],
    output: Annotated[Path, typer.Option(help=".svg, .png or another format of matplotlib.")],
) -> None:
    """A picture of what overlap-ablation or overlap-sensitivity found."""
    draw_gains(json.loads(found.read_text()), output)


def draw_gains(found: dict[str, Any], output: Path) -> None:
    """Write bars of an ablation, or the map of a sensitivity."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    if found["benchmark"] == "ablation":
        speed, energy = figure.subplots(1, 2)
        bars(speed, found["cells"], "speed", lambda arm: arm["over_sequential"])
        bars(energy, found["cells"], "energy of a layer", lambda arm: [part(arm, "layer_mj")] * 3)
        figure.legend(*speed.get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    else:
        gains(figure.subplots(), found)
    figure.suptitle(f"{found['model']}, {found['layers']} layers, {found['device']}, against sequential", fontsize=10)
    figure.savefig(output)


def part(arm: dict[str, Any], measured: str) -> float:
    return float(arm["measured"][measured] / arm["sequential"][measured])


def bars(axes: Axes, cells: list[dict[str, Any]], what: str, value: Callable[[dict[str, Any]], list[float]]) -> None:
    """`value(arm)`: of sequential's, with its interval."""
    width = 1 / (len(ARMS) + 1)
    for place, (name, colour) in enumerate(ARMS.items()):
        timed = [(x, value(cell["arms"][name])) for x, cell in enumerate(cells) if name in cell["arms"]]
        if not timed:
            continue
        middle = [x + (place - 1) * width for x, _ in timed]
        heights = [found[0] for _, found in timed]
        errors = [[found[0] - found[1] for _, found in timed], [found[2] - found[0] for _, found in timed]]
        drawn = axes.bar(middle, heights, width, yerr=errors, color=colour, label=name, error_kw={"lw": 1})
        labels = [f"{height:.3f}" for height in heights]
        axes.bar_label(drawn, labels, label_type="center", color="white", fontsize=7, rotation=90)
    axes.axhline(1, color="black", lw=0.8)
    axes.set(ylabel=f"{what}, of sequential's")
    axes.set_xticks(range(len(cells)), [f"{cell['workload']}\n{cell['tokens']:,} tokens" for cell in cells], fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def gains(axes: Axes, found: dict[str, Any]) -> None:
    """In bold what differs from 1 for certain, in italics and parentheses what was predicted and not timed; with a
    star, batches in which the KV memory bounds the decodes."""
    cells, margin = found["cells"], found.get("margin_95")
    sizes, contexts = (sorted({cell[name] for cell in cells}) for name in ("tokens", "context"))
    gain = {(cell["context"], cell["tokens"]): shown(cell) for cell in cells}
    grid = [[gain.get((context, tokens), float("nan")) for tokens in sizes] for context in contexts]
    span = max(SPAN, *(abs(value - 1) for value in gain.values()))
    axes.imshow(grid, cmap=GAINS, norm=TwoSlopeNorm(1, 1 - span, 1 + span), origin="lower", aspect="auto")
    for cell in cells:
        value, timed = shown(cell), "over_sequential" in cell
        text = f"{value:.3f}" if timed else f"({value:.3f})"
        axes.text(
            sizes.index(cell["tokens"]),
            contexts.index(cell["context"]),
            f"{text}{'*' * cell['memory_full']}\n{cell['attention_sms']} SMs",
            ha="center",
            va="center",
            fontsize=7,
            fontweight="bold" if timed and abs(value - 1) > margin else "normal",
            fontstyle="normal" if timed else "italic",
        )
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_yticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    legend = [f"bold: beyond ±{margin:.1%}"] if margin is not None else []
    legend += ["(italics): predicted, not timed"] if any("over_sequential" not in cell for cell in cells) else []
    legend += ["*: KV memory is full", "SMs: of attention"]
    axes.set(xlabel=f"tokens of a batch\n{'; '.join(legend)}", ylabel="mean context of decodes")


def shown(cell: dict[str, Any]) -> float:
    """The gain that was measured, or the one that was predicted."""
    return float(cell.get("over_sequential", cell["predicted"]["gain"]))
