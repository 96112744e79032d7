"""Reporter sends the news of an engine's steps, and with them its load as soon as that has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from nanoflow_backend.process.messages import Load, News
from nanoflow_backend.scheduler.batch import Delta
from nanoflow_backend.scheduler.scheduler import Scheduler

# Gateways ask every 50 ms, and the stub and the server need some of that.
LONG_STEP_S = 0.02


class Reporter:
    """For the thread of the engine's loop: each step is `scheduled`, and then `stepped`.

    A change of the load goes with the deltas of its step, which costs nothing. It goes before a step that may be long:
    one in which requests begin, for they bring their prompts, or that follows a long one.

    Attributes:
        received: sequences so far, refused ones too.
    """

    def __init__(self, send: Callable[[msgspec.Struct], None], scheduler: Scheduler) -> None:
        self.received = 0
        self._send = send
        self._scheduler = scheduler
        self._told = scheduler.load
        self._scheduled_s = 0.0

    def report(self, deltas: Sequence[Delta] = (), begun: Sequence[int] = ()) -> None:
        self._told = self._scheduler.load
        load = Load(*self._told, self._scheduler.queue_room, self.received)
        self._send(News(list(deltas), load, list(begun)))

    def scheduled(self, begun: Sequence[int]) -> None:
        """A step will be launched now. `begun`: see News."""
        before_s, self._scheduled_s = self._scheduled_s, time.monotonic()
        load, told = self._scheduler.load, self._told
        may_be_long = load[0] != told[0] or self._scheduled_s - before_s >= LONG_STEP_S
        if begun or (load != told and may_be_long):
            self.report(begun=begun)

    def stepped(self, deltas: Sequence[Delta], has_work: bool) -> None:
        """A step came back."""
        if deltas or not has_work or self._scheduler.load != self._told:
            self.report(deltas)
