"""This module formats the log lines of our processes, as text or as JSON: time, level, model and instance.

What decides it is in the environment, so that a stub, its engine and the ranks of that agree: NANOFLOW_LOG_LEVEL
(debug, info, warning, error), NANOFLOW_LOG_FORMAT (text, json), and NANOFLOW_LOG_ORIGIN, which a stub sets for its own.
"""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime

import msgspec

from nanoflow_backend.config.error import ConfigError

LEVEL, FORMAT, ORIGIN = "NANOFLOW_LOG_LEVEL", "NANOFLOW_LOG_FORMAT", "NANOFLOW_LOG_ORIGIN"
LEVELS, FORMATS = ("debug", "info", "warning", "error"), ("text", "json")
OURS = logging.getLogger("nanoflow_backend")  # all our loggers are below it


def configure(handler: logging.Handler | None = None, level: str = "info") -> None:
    """Send our lines of this process to standard error; or, as text, to `handler`, which adds time and level itself.

    Args:
        level: of the least grave lines that are written, where the environment does not say.

    Raises:
        ConfigError: one of the variables has a value that means nothing.
    """
    level, form = _chosen(LEVEL, LEVELS, level), _chosen(FORMAT, FORMATS, "text")
    if handler is None or form == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLine() if form == "json" else TextLine())
    OURS.handlers[:] = [handler]
    OURS.setLevel(level.upper())


def name_origin(model: str, instance: str) -> None:
    """Say for this process, and for those that it will start, whose lines they are."""
    os.environ[ORIGIN] = f"{model} {instance}"


def origin() -> tuple[str, str]:
    """(model, instance); empty where there is no server."""
    model, _, instance = os.environ.get(ORIGIN, "").partition(" ")
    return model, instance


class TextLine(logging.Formatter):
    """2026-01-31T12:00:00.000Z WARNING model=m instance=m_0_0 nanoflow_backend.engine.energy: what happened"""

    def format(self, record: logging.LogRecord) -> str:
        return f"{_time(record)} {record.levelname} {labelled(record)}"


class JsonLine(logging.Formatter):
    """One object a line: time, level, model, instance, pid, logger, message; and `exception`, where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        model, instance = origin()
        fields = {
            "time": _time(record),
            "level": record.levelname,
            "model": model,
            "instance": instance,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def labelled(record: logging.LogRecord) -> str:
    """A record's text after its time and level."""
    model, instance = origin()
    whose = f"model={model} instance={instance} " if model else ""
    trace = f"\n{logging.Formatter().formatException(record.exc_info)}" if record.exc_info else ""
    return f"{whose}{record.name}: {record.getMessage()}{trace}"


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _chosen(variable: str, values: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable, default).lower()
    if value not in values:
        raise ConfigError(f"{variable}: expected one of {', '.join(values)}, got {value!r}")
    return value
