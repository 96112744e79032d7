"""Watchdog notices that an engine process gets no further."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from nanoflow_backend.process.messages import Heartbeat
from nanoflow_backend.process.ticker import Ticker

CHECK_PERIOD_S = 0.25


class Watchdog:
    """Told of the process's heartbeats on one thread, it compares what they say on its own.

    A heartbeat alone proves only that the process is not stopped: one whose loop is stuck, as in a call that does not
    return, has a heart that goes on. Progress is a step more than before, or a loop with nothing to do.

    Args:
        limit_s: the longest step that may be. Some are long: on a slow CPU a prefill takes what it takes, and whatever
            was not compiled and captured before is, in the first step that needs it.
        on_stall: called once, when there has been no progress for `limit_s`. Time in which we did not run either, as in
            a container that is paused, does not count.
    """

    def __init__(
        self, limit_s: float, on_stall: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit_s = limit_s
        self._on_stall = on_stall
        self._clock = clock
        self._lock = threading.Lock()
        self._steps = -1  # as the last progress said
        self._still_s = 0.0  # since then
        self._checked_s = clock()
        self._done = False
        self._ticker = Ticker("watchdog", CHECK_PERIOD_S, self.check)

    def hear(self, heartbeat: Heartbeat) -> None:
        with self._lock:
            if heartbeat.idle or heartbeat.steps != self._steps:
                self._steps, self._still_s = heartbeat.steps, 0.0

    def check(self) -> None:
        """What its thread does every CHECK_PERIOD_S."""
        with self._lock:
            now_s = self._clock()
            self._still_s += min(now_s - self._checked_s, 2 * CHECK_PERIOD_S)
            self._checked_s = now_s
            stalled = self._still_s >= self._limit_s and not self._done
            self._done = self._done or stalled
        if stalled:
            self._on_stall()

    def stop(self) -> None:
        """The process is to end, or has ended: there is nothing to notice. Harmless when repeated."""
        with self._lock:
            self._done = True
        self._ticker.stop(CHECK_PERIOD_S)
