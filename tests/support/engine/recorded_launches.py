"""Ranks that write down what they launch, each in a file of its own; as a program this module is such a rank.

with the folder named in the environment as LAUNCHES, 0, 1, 2 ... are the files of the ranks
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoflow_backend.engine import ranks
from nanoflow_backend.engine.worker import Worker
from nanoflow_backend.runtime.binding import FittedPlan

FOLDER = "LAUNCHES"


class Recorder:
    """A LaunchWatcher that writes a line for each batch and each launch, before it is made."""

    def __init__(self, rank: int) -> None:
        self._file = (Path(os.environ[FOLDER]) / str(rank)).open("w", buffering=1)
        self._plan: FittedPlan | None = None

    def begin(self, plan: FittedPlan) -> int:
        self._plan = plan
        print("batch", plan.tokens, file=self._file)
        return 0

    def run(self, step: int, call: Callable[..., None], **keywords: Any) -> None:
        assert self._plan is not None
        layer, number = self._plan.bound.steps[step]
        launch = self._plan.bound.schedule.launches[number]
        print(layer, launch.operation, launch.start, launch.stop, launch.lane, file=self._file)
        call(**keywords)


class RecordingWorker(Worker):
    """A rank at work whose launches are written down from its first batch on."""

    def __init__(self, settled: Any, rank: int = 0, collectives: Any = None) -> None:
        super().__init__(settled, rank, collectives)
        self.program.watch(Recorder(rank))


def main() -> None:
    ranks.Worker = RecordingWorker  # type: ignore[misc]
    ranks.main()


if __name__ == "__main__":
    main()
