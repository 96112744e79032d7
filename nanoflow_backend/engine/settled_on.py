"""settled_on says what a configuration comes to on a kind of device that this machine need not have; without torch."""

from __future__ import annotations

from typing import Literal

from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig, SettledConfig
from nanoflow_backend.models.computed import read_computed
from nanoflow_backend.schedule.source import named_dense_batch_tokens


def settled_on(kind: Literal["cpu", "cuda"], config: EngineConfig) -> SettledConfig:
    """The configuration as an engine will have it, but for its schedule: found without making one.

    Raises:
        ConfigError: what can be seen to be wrong with it, or with the model's config.json.
        ScheduleError: its schedule file cannot be read.
    """
    config, _ = read_computed(config, kind)
    return replace(config, dense_batch_tokens=named_dense_batch_tokens(config)).settle(kind)
