"""Problem: what stage one decides about, as plain data: tasks, the chunks of a batch, durations, dependencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Task:
    """Operations that run back to back on the same tokens, in one lane.

    duration_us[a, b] is the time of chunks a .. b - 1 alone on the device; a range that is not there is not allowed.
    """

    name: str
    lane: str
    duration_us: Mapping[tuple[int, int], float]
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dependency:
    """`reader` reads, of the same tokens, what `writer` writes in the same layer or `layers_back` layers before.

    With `pages` it reads what was written for all tokens before its own too (attention, of the KV pages).
    """

    writer: str
    reader: str
    layers_back: int = 0
    pages: bool = False


@dataclass(frozen=True)
class Problem:
    """One layer, repeated for ever, on a batch of `chunks` equal chunks of tokens."""

    chunks: int
    tasks: tuple[Task, ...]
    dependencies: tuple[Dependency, ...]

    def __getitem__(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    @property
    def lanes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(task.lane for task in self.tasks))

    def sequential_us(self) -> float:
        """One task after the other on the whole batch."""
        return sum(task.duration_us[0, self.chunks] for task in self.tasks)

    def lane_us(self, lane: str) -> float:
        """All of a lane's tasks, uncut: no plan's period is shorter."""
        return sum(task.duration_us[0, self.chunks] for task in self.tasks if task.lane == lane)

    def cycles(self) -> list[tuple[str, ...]]:
        """Chains of tasks from layer to layer: each token goes once round in a period, so they bound it from below.

        Only the longest: those whose tasks are not all among another's.
        """
        follow: dict[str, list[str]] = {task.name: [] for task in self.tasks}
        for dependency in self.dependencies:
            if not dependency.layers_back:
                follow[dependency.writer].append(dependency.reader)

        def paths(first: str, last: str) -> list[tuple[str, ...]]:
            if first == last:
                return [(last,)]
            return [(first, *rest) for task in follow[first] for rest in paths(task, last)]

        found = {path for d in self.dependencies if d.layers_back == 1 for path in paths(d.reader, d.writer)}
        return [path for path in sorted(found) if not any(set(path) < set(other) for other in found)]


class NanoTask(NamedTuple):
    """Task `task` on chunks start .. stop - 1."""

    task: str
    start: int
    stop: int


class Placed(NamedTuple):
    """When it starts in a period, and how many layers it runs ahead of the others of that period."""

    nano: NanoTask
    start_us: float
    duration_us: float
    layers_ahead: int


@dataclass(frozen=True)
class Timeline:
    """One period of a cyclic plan. `gap` is the solver's, relative; 0: no plan is shorter."""

    period_us: float
    placed: tuple[Placed, ...]  # by start
    gap: float = 0.0
