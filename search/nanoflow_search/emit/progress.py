"""The progress display shows people how far a search is."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class ProgressDisplay:
    """Shows a bar for each phase on a terminal, and a line for each thing that is done, on pipes too."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._phase: TaskID | None = None
        self._begun: list[tuple[str, float]] = []

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, phase: str, total: int | None) -> None:
        """Begin a phase, which ends the one before. `total` is what `advance` counts to; None: not known."""
        if self._phase is not None:
            self._progress.remove_task(self._phase)
        self._phase = self._progress.add_task(phase, total=total)
        self._begun.append((phase, time.monotonic()))
        self.say(phase)

    @property
    def phases_s(self) -> dict[str, float]:
        """The seconds of each phase so far, in this run alone."""
        ends_s = [*(begun_s for _, begun_s in self._begun[1:]), time.monotonic()]
        return {phase: end_s - begun_s for (phase, begun_s), end_s in zip(self._begun, ends_s, strict=True)}

    def advance(self) -> None:
        """Count one unit of the phase."""
        assert self._phase is not None
        self._progress.advance(self._phase)

    def say(self, line: str) -> None:
        """Print a line."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
