"""find_schedule: the validated schedule that a configuration names."""

from __future__ import annotations

import re
from pathlib import Path

from nanoflow_backend.config import SettledConfig
from nanoflow_backend.graph.collectives import split_all_reduce
from nanoflow_backend.graph.operation import Model
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule, ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate


def find_schedule(config: SettledConfig, model: Model, device: str = "cpu", device_sms: int | None = None) -> Schedule:
    """The plan for batches of up to `config.dense_batch_tokens`, of `model` as `build` makes it, on `device`.

    `config.schedule` is "sequential", "nano-batched-N" or the path of a schedule file.

    Raises:
        ScheduleError: naming the preset or the file, and what is wrong with it.
    """
    name, tokens, tp = config.schedule, config.dense_batch_tokens, config.tensor_parallel
    file = ScheduleFile.load(Path(name)) if name.endswith(".json") else None
    try:
        if file is not None:
            file.check_header(model.layer, device, tp, device_sms)
            schedule = file.plan_for(tokens)
        elif name == "sequential":
            schedule = sequential(model.layer, tokens)
        elif preset := re.fullmatch(r"nano-batched-(\d+)", name):
            schedule = nano_batched(model.layer, tokens, int(preset[1]))
        else:
            raise ScheduleError("expected sequential, nano-batched-N, or the path of a .json schedule file")
        validate(schedule, split_all_reduce(model.layer, schedule.split_all_reduces, tp), model.num_layers, device_sms)
    except ValueError as error:  # ScheduleError is one
        raise ScheduleError(f"schedule {name}: {error}") from None
    return schedule
