"""Trace holds the lengths and arrivals of real requests, without their text."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from nanoflow_backend.config.error import ConfigError


@dataclass(frozen=True)
class Trace:
    """One entry for each request, in the file's order."""

    lengths: tuple[tuple[int, int], ...]  # input and output tokens
    arrivals_s: tuple[float, ...]  # since the first row
    dropped_rows: int = 0  # without input or without output
    too_long_rows: int = 0  # for the model: left out


def read_trace(path: Path, max_model_tokens: int) -> Trace:
    """Read a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens (Azure LLM inference traces).

    Rows with a count below 1, and those of more than `max_model_tokens` in all, are left out and counted.

    Raises:
        ConfigError: naming the file and the column or line.
    """
    lengths: list[tuple[int, int]] = []
    arrivals_s: list[float] = []
    dropped = too_long = 0
    start: datetime | None = None
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(rows.fieldnames or ())
        if missing:
            raise ConfigError(f"{path}: expected the columns {', '.join(sorted(missing))}, found {rows.fieldnames}")
        for row in rows:
            try:
                # the seventh decimal of the seconds is more than Python reads
                arrival = datetime.fromisoformat(row["TIMESTAMP"][:26])
                input_tokens, output_tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{path}, line {rows.line_num}: expected a time and two counts, got {row}") from error
            start = start or arrival
            if input_tokens < 1 or output_tokens < 1:
                dropped += 1
                continue
            if input_tokens + output_tokens > max_model_tokens:
                too_long += 1
                continue
            lengths.append((input_tokens, output_tokens))
            arrivals_s.append((arrival - start).total_seconds())
    return Trace(tuple(lengths), tuple(arrivals_s), dropped, too_long)
