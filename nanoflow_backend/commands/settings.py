"""Settings: `--set field=value` on the command line to an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanoflow_backend.config import ConfigError
from nanoflow_backend.engine import Engine


def make_engine(model: Path, settings: Sequence[str], **defaults: Any) -> Engine:
    """Raises: ConfigError for a setting without "=", an unknown field or a bad value."""
    fields = dict(defaults)
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"--set {setting}: expected field=value")
        if field == "model":
            raise ConfigError(f"--set {setting}: expected the model as --model")
        fields[field] = value
    return Engine.from_pretrained(model, **fields)
