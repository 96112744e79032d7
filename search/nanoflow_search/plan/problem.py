"""The problem of stage one is one layer as plain data: its tasks, the chunks of a batch, durations and dependencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Task:
    """Operations that run back to back on the same tokens, in one lane.

    duration_us[a, b] is the time of the chunks a .. b - 1 alone on the device. Ranges that are absent are not allowed.
    """

    name: str
    lane: str
    duration_us: Mapping[tuple[int, int], float]
    operations: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskDependency:
    """A task reads what another one writes for the same tokens, in the same layer or `layers_back` layers before.

    With `pages` it also reads what was written for all tokens before its own: attention does so, from the KV pages.
    """

    writer: str
    reader: str
    layers_back: int = 0
    pages: bool = False


@dataclass(frozen=True)
class Problem:
    """One layer that is repeated for ever, on a batch of `chunks` equal chunks of tokens."""

    chunks: int
    tasks: tuple[Task, ...]
    dependencies: tuple[TaskDependency, ...]

    def __getitem__(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    @property
    def lanes(self) -> tuple[str, ...]:
        """The names of the lanes, in the order of their first tasks."""
        return tuple(dict.fromkeys(task.lane for task in self.tasks))

    def sequential_us(self) -> float:
        """Return the time of all tasks one after the other on the whole batch."""
        return sum(task.duration_us[0, self.chunks] for task in self.tasks)

    def lane_us(self, lane: str) -> float:
        """Return the time of a lane's tasks, uncut: no plan's period is shorter."""
        return sum(task.duration_us[0, self.chunks] for task in self.tasks if task.lane == lane)

    def cycles(self) -> list[tuple[str, ...]]:
        """Return the chains of tasks that lead from one layer to the next.

        Each token passes each chain once in a period, so that the chain's time bounds the period from below. A chain
        whose tasks are all in another chain is left out.
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
    """A part of a task: the task on the chunks start .. stop - 1."""

    task: str
    start: int
    stop: int

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.task} {self.start}..{self.stop}"


class PlacedTask(NamedTuple):
    """A nano-task with its place in the period."""

    nano: NanoTask
    start_us: float
    duration_us: float
    layers_ahead: int  # how many layers it is ahead of the layer that the period belongs to


@dataclass(frozen=True)
class CyclicTimeline:
    """One period of a plan that is repeated for ever.

    `gap` is the solver's relative gap; 0 means that no plan is shorter.
    """

    period_us: float
    placed: tuple[PlacedTask, ...]  # ascending by start
    gap: float = 0.0
