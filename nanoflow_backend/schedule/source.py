"""find_schedules gives the validated plans that a configuration names."""

from __future__ import annotations

import re
from pathlib import Path

from nanoflow_backend.config.engine_config import EngineConfig, SettledConfig
from nanoflow_backend.graph.collectives import model_in_forms
from nanoflow_backend.graph.model import Model
from nanoflow_backend.schedule.file import ScheduleFile
from nanoflow_backend.schedule.plan import Schedule, ScheduleError
from nanoflow_backend.schedule.presets import nano_batched, sequential
from nanoflow_backend.schedule.validate import validate


def find_schedules(
    config: SettledConfig, model: Model, device: str = "cpu", device_sms: int | None = None
) -> tuple[Schedule, ...]:
    """The plans for batches of up to `config.dense_batch_tokens`, of `model` as `build` makes it, on `device`.

    `config.schedule` is "sequential", "nano-batched-N" or the path of a schedule file, which "auto" has become. A
    batch runs under the first that holds it; one that is larger than any plan of the file, sequential.

    Raises:
        ScheduleError: naming the preset or the file, and what is wrong with it.
    """
    name, tokens, tp = config.schedule, config.dense_batch_tokens, config.tensor_parallel
    file = ScheduleFile.load(Path(name)) if is_file(name) else None
    try:
        if file is not None:
            file.check_header(model, config.precision, device, tp, device_sms)
            plans = file.plans_up_to(tokens)
            if plans[-1].tokens < tokens:
                plans = (*plans, sequential(model.layer, tokens))
        elif name == "sequential":
            plans = (sequential(model.layer, tokens),)
        elif preset := re.fullmatch(r"nano-batched-(\d+)", name):
            plans = (nano_batched(model.layer, tokens, int(preset[1])),)
        else:
            raise ScheduleError("expected sequential, nano-batched-N, auto, or the path of a .json schedule file")
        for plan in plans:
            graph = model_in_forms(model, plan.all_reduces, tp).layer
            validate(plan, graph, model.num_layers, device_sms, ranks=tp)
    except ValueError as error:  # ScheduleError is one
        raise ScheduleError(f"schedule {name}: {error}") from None
    return plans


def named_dense_batch_tokens(config: EngineConfig) -> int | None:
    """What the configuration says, or else its schedule file. Raises: ScheduleError, the file cannot be read."""
    if config.dense_batch_tokens is not None or not is_file(config.schedule):
        return config.dense_batch_tokens
    return ScheduleFile.load(Path(config.schedule)).header.dense_batch_tokens


def is_file(schedule: str) -> bool:
    return schedule.endswith(".json")
