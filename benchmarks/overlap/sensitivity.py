"""A map shows over which batches overlap pays: tokens of a batch against the mean context of its decodes.

Each cell has the plan that is predicted to take least, of two nano-batches with attention on SMs of its own, with
prompts twice as long as outputs. The cells are first all planned and predicted, which needs no GPU. The same command
where one is times the plans of the file, of all cells or of those that --tokens and --context name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from nanoflow_search.cost.batch_sizes import checked_sizes
from nanoflow_search.emit.statistics import STUDENT

from benchmarks.overlap.steady_batches import facts_of, steady_batches
from benchmarks.resumable import Cell, Record, fill

TOKENS = (512, 1024, 1536, 2048, 3072, 4096)
CONTEXTS = (512, 1024, 2048, 4096, 8192)


def main(
    model: Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")],
    profile: Annotated[Path, typer.Option(help="Of nanoflow-search: all plans follow from it.")],
    output: Annotated[Path, typer.Option(help="The JSON result, written after every cell; goes on where it was cut.")],
    tokens: Annotated[list[int] | None, typer.Option(help="Of a batch; repeatable, default: 512 to 4096.")] = None,
    context: Annotated[
        list[int] | None, typer.Option(help="Mean, of what decodes; repeatable, default: 512 to 8192.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Default: the model's; with fewer, ramps weigh more.")] = None,
    duration_s: Annotated[float, typer.Option(help="That is measured, a run.")] = 0.3,
) -> None:
    """Where overlap pays: without a GPU it plans and predicts; again where a GPU is, it times the plans of the file."""
    batches, here = steady_batches(model, profile, device="auto", layers=layers, duration_s=duration_s)
    record = Record(output, facts_of(batches, model, "sensitivity", duration_s), margin_of_timed)
    sizes = checked_sizes(tokens or TOKENS)
    keys = [{"context": mean_context, "tokens": size} for mean_context in context or CONTEXTS for size in sizes]
    fill(
        record,
        keys,
        lambda key, known: known or batches.plan(**key),
        lambda cell: f"predicted {cell['predicted']['gain']:.3f}x",
    )
    if here.kind == "cpu":
        print("predicted; the same command where a GPU is times the plans", flush=True)
        return
    fill(
        record,
        keys,
        lambda _, planned: planned if "over_sequential" in planned else batches.time(planned),
        lambda cell: f"{cell['over_sequential']:.3f}x, predicted {cell['predicted']['gain']:.3f}x",
    )


def margin(cells: Sequence[Cell]) -> float:
    """Half of the 95 % interval of one cell's gain, relative: by how the pairs of a cell differ, pooled over all."""
    variance = mean(math.log(one / other) ** 2 / 2 for one, other in (cell["pairs"] for cell in cells))
    return STUDENT[min(len(cells), len(STUDENT)) - 1] * math.sqrt(variance / 2)


def margin_of_timed(cells: Sequence[Cell]) -> Cell:
    timed = [cell for cell in cells if "pairs" in cell]
    return {"margin_95": round(margin(timed), 5)} if timed else {}
