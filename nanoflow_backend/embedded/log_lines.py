"""This module picks what people need of a server's log: why our model failed, our warnings, else the last lines."""

from __future__ import annotations

import re

TAIL_LINES = 30
# Information lines and tables: the server prints its options after the error that ends it.
NOISE = re.compile(r"I\d{4} |[|+]|\s*$")
# Errors whose words name what is wrong; a trace follows them, after a newline that the server may have escaped.
NAMED = r"(?:EngineError|ConfigError|ScheduleError|InvalidTokenizer|WeightsError)"
FAILURE = re.compile(
    rf"failed to load '([^']+)' version \d+: Internal: (?:{NAMED}: )+(.+?)(?:\\n|\n|\"?$)", re.MULTILINE
)
# Our lines as text, through the server's log, and as JSON: nanoflow_backend/process/logs.py.
WARNING = re.compile(r'\S+ (WARNING|ERROR) model=|[WE]\d{4} .*\] "?model=|\{"time":"[^"]+","level":"(WARNING|ERROR)"')


def failures(log: str) -> list[str]:
    """One line for each model of ours that could not load, where an error of ours says why."""
    return list(dict.fromkeys(f"model {name}: {why}" for name, why in FAILURE.findall(log)))


def warnings(log: str) -> list[str]:
    """The lines of level WARNING and worse that our models wrote, not the server itself."""
    return [line for line in log.splitlines() if WARNING.match(line)]


def tail(log: str) -> list[str]:
    """The last lines that say something."""
    lines = [line.replace("\\n", "\n") for line in log.splitlines() if not NOISE.match(line)]
    return lines[-TAIL_LINES:]
