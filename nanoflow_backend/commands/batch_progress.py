"""BatchProgress shows how a batch gets on: lines, lines and tokens a second, failed lines, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from nanoflow_backend.offline.result_file import ResultFile

COLUMNS = (TextColumn("completions"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))


class BatchProgress:
    """Rates are those since it was made; results of runs before count as done, and in no rate.

    Args:
        total: lines of the input; None: unknown, so there is no end to foresee.
    """

    def __init__(
        self,
        total: int | None,
        results: ResultFile,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._results, self._clock = total, results, clock
        self._begin = clock(), results.lines, results.tokens
        self._bar = Progress(*COLUMNS, console=console or Console(stderr=True))
        self._task = self._bar.add_task("", total=total, completed=results.lines)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def update(self) -> None:
        """Show what the results have come to."""
        self._bar.update(self._task, completed=self._results.lines, description=self.text())

    def text(self) -> str:
        """What stands beside the bar."""
        begin_s, lines, tokens = self._begin
        seconds = max(self._clock() - begin_s, 1e-9)
        rate = (self._results.lines - lines) / seconds
        words = [f"{rate:,.1f} lines/s", f"{(self._results.tokens - tokens) / seconds:,.0f} tokens/s"]
        words.append(f"{self._results.failed:,} failed")
        if self._total is not None and rate:
            words.append(f"{timedelta(seconds=round((self._total - self._results.lines) / rate))} left")
        return ", ".join(words)
