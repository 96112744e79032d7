"""plan: the validated schedule that a configuration names, and the model in the form that it runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Model
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule, ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate


def plan(
    name: str,
    model: Model,
    tokens: int,
    *,
    tensor_parallel: int = 1,
    device: str = "cpu",
    device_sms: int | None = None,
    granularity: int = 1,
) -> tuple[Schedule, Model]:
    """The schedule for batches of up to `tokens`, and `model` with those all-reduces split that the schedule splits.

    `name` is as in EngineConfig: "sequential", "nano-batched-N" or the path of a schedule file. `granularity` is
    that of the built-in plans.

    Raises:
        ScheduleError: naming the preset or the file, and what is wrong with it.
    """
    file = ScheduleFile.load(Path(name)) if name.endswith(".json") else None
    try:
        if file is not None:
            file.check_header(model.layer, device, tensor_parallel, device_sms)
            schedule = file.plan_for(tokens)
            model = replace(model, layer=split_all_reduce(model.layer, schedule.split_all_reduces, tensor_parallel))
        elif name == "sequential":
            schedule = sequential(model.layer, tokens)
        elif preset := re.fullmatch(r"nano-batched-(\d+)", name):
            schedule = nano_batched(model.layer, tokens, int(preset[1]), granularity)
        else:
            raise ScheduleError("expected sequential, nano-batched-N, or the path of a .json schedule file")
        validate(schedule, model.layer, model.num_layers, device_sms)
    except ValueError as error:  # ScheduleError is one
        raise ScheduleError(f"schedule {name}: {error}") from None
    return schedule, model
