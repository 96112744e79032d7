"""These functions read `--set field=value` of the command line into a configuration, and make an engine of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError

if TYPE_CHECKING:
    from nanoflow_backend.engine import Engine


def parse(settings: Sequence[str]) -> dict[str, Any]:
    """A value is text, or JSON if it begins as an object does, or begins and ends as a list does.

    Raises:
        ConfigError: a setting without "=", one of the model, or an object or list that is no JSON.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected field=value")
        if field == "model":
            raise ConfigError(f"--set {setting}: expected the model as --model")
        try:
            is_list = value.startswith("[") and value.endswith("]")  # [IPV6]:PORT is none
            fields[field] = msgspec.json.decode(value) if value.startswith("{") or is_list else value
        except msgspec.DecodeError as error:
            raise ConfigError(f"--set {setting}: expected JSON: {error}") from None
    return fields


def engine_config(model: Path, settings: Sequence[str], **defaults: Any) -> EngineConfig:
    """Raises: ConfigError as `parse` does, for an unknown field or a bad value."""
    return EngineConfig.resolve({"model": str(model), **defaults, **parse(settings)}, relative_to=Path.cwd())


def make_engine(model: Path, settings: Sequence[str], **defaults: Any) -> Engine:
    """Raises: ConfigError as `engine_config` does, and for what is wrong in the model's folder."""
    from nanoflow_backend.engine import Engine

    return Engine(engine_config(model, settings, **defaults))
