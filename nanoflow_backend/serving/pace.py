"""Pace: holds back a thread that does something too often."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """At most `per_s` times a second in the long run; after a pause up to `burst` times at once. For one thread."""

    def __init__(
        self,
        per_s: float,
        burst: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._interval_s = 1 / per_s
        self._burst_s = (burst - 1) / per_s
        self._clock, self._sleep = clock, sleep
        self._due_s = clock() - self._burst_s  # when the next time is due at an even pace

    def wait(self) -> None:
        """Return when it may be done again."""
        now_s = self._clock()
        due_s = max(self._due_s, now_s - self._burst_s)
        self._due_s = due_s + self._interval_s
        if due_s > now_s:
            self._sleep(due_s - now_s)
