"""Given schedules are timed beside sequential in a steady state, and predicted before: `nanoflow-search time`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanoflow_backend.graph.model import Model
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate
from nanoflow_search.emit.statistics import PlanTrial
from nanoflow_search.emit.trials import Arm, time_round
from nanoflow_search.predict.predict import Timer, Timing, predict
from nanoflow_search.predict.timing_model import TimingModel


def named_schedules(names: Sequence[str], model: Model, tokens: int) -> dict[str, Schedule]:
    """Return schedules by name: the preset `nano-batched-N`, and all plans of files but sequential ones.

    Raises:
        ValueError: a file has no plan for batches of `tokens`.
        ScheduleError: a file cannot be read, or a plan is not valid for the model.
    """
    found: dict[str, Schedule] = {}
    base = sequential(model.layer, tokens)
    for name in names:
        if name.startswith("nano-batched-"):
            found[name] = nano_batched(model.layer, tokens, _count(name))
            continue
        plans = ScheduleFile.load(Path(name)).plans
        if tokens not in [plan.tokens for plan in plans]:
            raise ValueError(f"{name}: has plans for {[plan.tokens for plan in plans]} tokens, none for {tokens}")
        found |= {
            f"{Path(name).name}:{i}": plan for i, plan in enumerate(plans) if plan.tokens == tokens and plan != base
        }
    for schedule in found.values():
        validate(schedule, model.layer, model.num_layers)
    return found


def time_schedules(
    schedules: Mapping[str, Schedule],
    base: Schedule,
    facts: Mapping[str, Any],
    output: Path,
    timer: Timer,
    rounds: int,
    write: Callable[[dict[str, Any]], None],
    predict_with: TimingModel | None = None,
    num_layers: int = 1,
    say: Callable[[str], None] = print,
) -> None:
    """Time `schedules` beside the sequential schedule `base`, and `write` the result to the file `output` after each.

    What the file holds is not timed again. `facts` say what the batches are; with a timing model each schedule is
    predicted first, on `num_layers` layers.

    Raises:
        ValueError: the file is a result of other batches; the message names every difference.
    """
    cells = _known_cells(output, facts)
    predictions: dict[str, Timing] = {}
    if predict_with is not None:
        named = {"sequential": base, **schedules}
        predictions = {name: predict(plan, predict_with, num_layers) for name, plan in named.items()}
    for name, timing in predictions.items():
        say(f"predicted {name}: {rounded(timing)}")
    missing = [name for name in schedules if name not in {cell["schedule"] for cell in cells}]
    if not missing:
        say(f"{output}: all schedules are timed")
        return
    alone = timer(base)
    say(f"measured sequential: {rounded(alone)}")
    beside = {
        "sequential_predicted": rounded(predictions["sequential"]) if predictions else None,
        "sequential": rounded(alone),
    }
    for name in missing:
        entry = compare(timer, base, {name: schedules[name]}, rounds)[name]
        if predicted := predictions.get(name):
            error = predicted.layer_us / entry["measured"]["layer_us"] - 1
            entry |= {"predicted": rounded(predicted), "error": round(error, 4)}
        cells.append({"schedule": name, **entry})
        write({**facts, **beside, "cells": cells})
        say(f"{name}: {json.dumps(entry)}")


def compare(
    timer: Callable[[Arm], Timing], base: Arm, plans: Mapping[str, Arm], rounds: int
) -> dict[str, dict[str, Any]]:
    """Time plans in turns with the sequential schedule `base`, and return what results show of each.

    `over_sequential` is how much faster a plan is: the geometric mean over rounds, and its 95 % interval.
    """
    taken = [time_round(timer, base, list(plans.values())) for _ in range(rounds)]
    trials = {name: PlanTrial.of(of_plan) for name, of_plan in zip(plans, zip(*taken, strict=True), strict=True)}
    return {
        name: {
            "measured": rounded(trial.timing),
            "sequential": rounded(trial.sequential),
            "over_sequential": [round(value, 4) for value in trial.gain],
            "rounds": rounds,
        }
        for name, trial in trials.items()
    }


def rounded(timing: Timing) -> dict[str, float]:
    """Return a timing as results show it."""
    return {
        "layer_us": round(timing.layer_us, 2),
        "sm_clock_mhz": round(timing.clock_mhz, 1),
        "mean_power_w": round(timing.power_w, 1),
        "layer_mj": round(1e3 * timing.layer_j, 2),
    }


def _count(name: str) -> int:
    text = name.removeprefix("nano-batched-")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"schedule: expected a file, or nano-batched-N with a number N, got {name!r}")
    return int(text)


def _known_cells(output: Path, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the schedules that the file holds already."""
    if not output.exists():
        return []
    found = json.loads(output.read_text())
    differences = [
        f"{name} is {found.get(name)!r} there and {fact!r} here"
        for name, fact in facts.items()
        if found.get(name) != fact
    ]
    if differences:
        raise ValueError(f"{output}: the result of another run: {'; '.join(differences)}")
    cells: list[dict[str, Any]] = found["cells"]
    return cells
