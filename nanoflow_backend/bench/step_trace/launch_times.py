"""LaunchTimes are watchers of a program that find when each launch of its layers began and ended.

On a CPU a launch returns when it is done, and the clock says it. On a GPU there is an event before and one behind each
launch, in its lane's stream. They are external: under capture each becomes a node of the CUDA graph, which every replay
records anew. Such a node stands between two kernels like any other, so the second cannot start while the first ends
(PDL), and a step takes longer than one that is not watched.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from nanoflow_backend.runtime.binding import FittedPlan

LAPS = 2  # a step is read once it is collected, when the next one is launched, but not the one after that


class LaunchTime(NamedTuple):
    """Of one launch. `step` is its place in the order of issue, times are those of time.perf_counter()."""

    step: int
    start_s: float
    end_s: float


class LaunchTimes(Protocol):
    """A LaunchWatcher that can be read, and makes marks on the device's own time line.

    Attributes:
        lap: which set of times the launches of the next batch go to: 0 .. LAPS - 1.
        how: where the times come from, for people.
    """

    lap: int
    how: str

    def begin(self, plan: FittedPlan) -> int: ...

    def run(self, step: int, call: Callable[..., None], **keywords: Any) -> None: ...

    def align(self) -> None:
        """Compare the device's clock with the host's, when the device has nothing left to do."""
        ...

    def read(self, plan: FittedPlan, lap: int) -> list[LaunchTime]:
        """Of the last batch that ran under `plan` in `lap`, and is done: its launches in the order of issue."""
        ...

    def mark(self) -> Any:
        """The moment when the device gets here, behind all that was launched on the caller's stream."""
        ...

    def seconds(self, mark: Any) -> float:
        """When a mark was passed, in time of time.perf_counter(). The device has passed it."""
        ...

    def wait(self) -> None:
        """Until the device has done all that was launched."""
        ...


class ClockedLaunches:
    """LaunchTimes of a program whose launches return when they are done."""

    how = "the host's clock, before and after each launch"

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lap = 0
        self._clock = clock
        self._times: list[list[LaunchTime]] = [[] for _ in range(LAPS)]

    def align(self) -> None: ...

    def begin(self, plan: FittedPlan) -> int:
        self._times[self.lap] = []
        return self.lap

    def run(self, step: int, call: Callable[..., None], **keywords: Any) -> None:
        start_s = self._clock()
        call(**keywords)
        self._times[self.lap].append(LaunchTime(step, start_s, self._clock()))

    def read(self, plan: FittedPlan, lap: int) -> list[LaunchTime]:
        return self._times[lap]

    def mark(self) -> float:
        return self._clock()

    def seconds(self, mark: float) -> float:
        return mark

    def wait(self) -> None: ...


class _Events(NamedTuple):
    start: torch.cuda.Event
    end: torch.cuda.Event


class RecordedLaunches:
    """LaunchTimes of a CudaProgram, by events.

    `align` records one on an idle device: there both clocks show the same time, but for some microseconds.
    """

    def __init__(self, cuda_graphs: bool) -> None:
        where = (
            "nodes of the captured CUDA graphs" if cuda_graphs else "recorded as launches are issued, no CUDA graphs"
        )
        self.how = f"CUDA events around each launch, {where}"
        self.lap = 0
        self._of: defaultdict[tuple[FittedPlan, int], dict[int, _Events]] = defaultdict(dict)
        self._batch: tuple[FittedPlan, int] | None = None
        self.align()

    def align(self) -> None:
        """An event's time is a float, in ms since this: after a second it is exact to 60 ns."""
        torch.cuda.synchronize()
        self._zero = _recorded()
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def begin(self, plan: FittedPlan) -> int:
        self._batch = plan, self.lap
        return self.lap

    def run(self, step: int, call: Callable[..., None], **keywords: Any) -> None:
        assert self._batch is not None, "a launch comes after begin"
        events = self._of[self._batch]
        if step not in events:
            events[step] = _Events(*(torch.cuda.Event(enable_timing=True, external=True) for _ in range(2)))
        events[step].start.record()
        call(**keywords)
        events[step].end.record()

    def read(self, plan: FittedPlan, lap: int) -> list[LaunchTime]:
        return [
            LaunchTime(step, self.seconds(events.start), self.seconds(events.end))
            for step, events in sorted(self._of[plan, lap].items())
        ]

    def mark(self) -> torch.cuda.Event:
        return _recorded()

    def seconds(self, mark: torch.cuda.Event) -> float:
        return self._zero_s + 1e-3 * float(self._zero.elapsed_time(mark))

    def wait(self) -> None:
        torch.cuda.synchronize()


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
