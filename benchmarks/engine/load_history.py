"""LoadHistory is every load that an engine had, with its time: what its gauges should have shown at any moment."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nanoflow_backend.engine import loop
from nanoflow_backend.process.reporter import Reporter
from nanoflow_backend.scheduler.batch import Delta
from nanoflow_backend.scheduler.scheduler import Scheduler

MOST_CHANGES = 4_000_000  # of 32 bytes in a file with holes
COLUMNS = ("running", "waiting", "used_pages")


class RecordingReporter(Reporter):
    """A Reporter that keeps each load in a file, also when its process is killed; `tells`: as early as it is known."""

    def __init__(self, send: Callable[[msgspec.Struct], None], scheduler: Scheduler, file: Path, tells: bool) -> None:
        super().__init__(send, scheduler)
        self._rows = np.memmap(file, np.float64, "w+", shape=(MOST_CHANGES, 1 + len(COLUMNS)))
        self._next, self._last, self._tells = 0, scheduler.load, tells

    def scheduled(self, begun: Sequence[int]) -> None:
        self._record()
        if self._tells or begun:
            super().scheduled(begun)

    def stepped(self, deltas: Sequence[Delta], has_work: bool) -> None:
        self._record()
        if self._tells or deltas or not has_work:
            super().stepped(deltas, has_work)

    def _record(self) -> None:
        if (load := self._scheduler.load) != self._last:
            self._last = load
            self._rows[self._next] = (time.monotonic(), *load)
            self._next += 1


def record(file: str, tells: bool) -> None:
    """In the process of an engine, before it starts: keep its loads. Not `tells`: only what requests need is sent."""
    loop.Reporter = partial(RecordingReporter, file=Path(file), tells=tells)  # type: ignore[assignment,misc]


class LoadHistory:
    """One column of the loads in a file."""

    def __init__(self, file: Path, column: str) -> None:
        rows: Any = np.memmap(file, np.float64, "r").reshape(-1, 1 + len(COLUMNS))
        rows = rows[: np.count_nonzero(rows[:, 0])]
        values = rows[:, 1 + COLUMNS.index(column)]
        changed = np.flatnonzero(np.diff(values, prepend=0))
        self._times: list[float] = rows[changed, 0].tolist()  # in seconds of `time.monotonic()`
        self._values: list[float] = values[changed].tolist()

    def changes(self, from_s: float, until_s: float) -> int:
        return bisect_right(self._times, until_s) - bisect_right(self._times, from_s)

    def age_s(self, value: float, asked_s: float, answered_s: float) -> float:
        """For how long a value was not true any more when it was asked for; 0: it was, then or until the answer.

        Raises:
            ValueError: it never was.
        """
        since = bisect_right(self._times, answered_s) - 1
        ended_s = answered_s
        while since >= 0 and self._values[since] != value:
            ended_s = self._times[since]
            since -= 1
        if since < 0 and value != 0:
            raise ValueError(f"{value:g} was never true before {answered_s:.3f} s")
        return max(0.0, asked_s - ended_s)
