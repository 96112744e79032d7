"""The paper's Fig. 9 is measured again: what cutting a steady batch costs, what overlap wins, what the search adds.

Three arms are timed against sequential: two halves one after the other ("nano-batch only"), attention of one half on
SMs of its own beside the rest of the other ("overlap memory": halves.py), and the plan of a schedule file ("searched").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from nanoflow_search.cost.batch_sizes import checked_sizes
from nanoflow_search.cost.workload import MeanWorkload
from nanoflow_search.profile.data import Profile

from benchmarks.overlap.steady_batches import facts_of, steady_batches
from benchmarks.resumable import Cell, Record, fill
from nanoflow_backend.graph.model import Model
from nanoflow_backend.schedule.file import ScheduleFile

BATCHES = ("512/2:2048", "512/512:2048", "1024/512:2048", "512/1024:1536")  # sizes whose halves fill waves of tiles


def main(
    model: Annotated[Path, typer.Option(help="A folder with a Hugging Face config.json.")],
    profile: Annotated[Path, typer.Option(help="Of nanoflow-search: all plans follow from it.")],
    output: Annotated[Path, typer.Option(help="The JSON result, written after every cell; goes on where it was cut.")],
    batch: Annotated[
        list[str] | None, typer.Option(help=f"PROMPT/OUTPUT:TOKENS; repeatable, default: {' '.join(BATCHES)}.")
    ] = None,
    schedule: Annotated[list[Path] | None, typer.Option(help="A file of the search; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=2, max=21, help="Of A B C C B A, in turns with sequential.")] = 3,
    layers: Annotated[int | None, typer.Option(help="Default: the model's; with fewer, ramps weigh more.")] = None,
    duration_s: Annotated[float, typer.Option(help="That is measured, a run.")] = 0.5,
) -> None:
    """What cutting a batch costs, what overlap wins, what the search adds (the paper's Fig. 9)."""
    batches, _ = steady_batches(model, profile, device="cuda", layers=layers, duration_s=duration_s)
    files = load_schedules(schedule or (), batches.model, batches.profile)
    fill(
        Record(output, facts_of(batches, model, "ablation", duration_s)),
        [parse_batch(text) for text in batch or BATCHES],
        lambda key, known: batches.ablate(**key, files=files, rounds=rounds, known=known),
        summarise_arms,
    )


def parse_batch(text: str) -> Cell:
    """Read "1024/512:2048". Raises: ValueError."""
    workload, _, tokens = text.partition(":")
    MeanWorkload.parse(workload)
    if not tokens.isdecimal():
        raise ValueError(f"batch: expected PROMPT/OUTPUT:TOKENS such as {BATCHES[0]}, got {text!r}")
    (size,) = checked_sizes([int(tokens)])
    return {"workload": workload, "tokens": size}


def load_schedules(paths: Sequence[Path], model: Model, profile: Profile) -> dict[str, ScheduleFile]:
    """Raises: ScheduleError, a file for another model or device."""
    files = {path.name: ScheduleFile.load(path) for path in paths}
    for file in files.values():
        file.check_header(model, profile.header.precision, profile.header.device, 1, profile.header.device_sms)
    return files


def summarise_arms(cell: Cell) -> str:
    """A line for the terminal: the gain of each arm that was timed, and why the others were not."""
    gains = [f"{name} {arm['over_sequential'][0]:.3f}x" for name, arm in cell["arms"].items()]
    return ", ".join(gains + [f"{name}: {why}" for name, why in cell["untimed"].items()])
