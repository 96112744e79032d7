"""LaunchWatcher is the interface of what looks on while a program runs its launches, to time them (`Program.watch`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from nanoflow_backend.runtime.binding import FittedPlan


class LaunchWatcher(Protocol):
    """Runs every launch of the layers in the program's place. Without one a program does nothing for it."""

    def begin(self, plan: FittedPlan) -> int:
        """A batch begins under `plan`. Returns its lap: a CUDA graph is captured for one lap, and belongs to it.

        What `run` records is in the graph, so the next batch of this plan and lap overwrites it.
        """
        ...

    def run(self, step: int, call: Callable[..., None], **keywords: Any) -> None:
        """Make a launch, on the stream of its lane: `call(**keywords)`. `step` is its place in the order of issue."""
        ...
