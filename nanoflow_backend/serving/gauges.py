"""Gauges: the state of the engine on the server's metrics page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nanoflow_backend.engine.messages import Ready
from nanoflow_backend.scheduler.stats import SchedulerStats

FLUSH_PERIOD_S = 0.25  # each value is a round trip to the server, so a timer sets them, not every step


class Gauge(Protocol):
    def set(self, value: float) -> None: ...


class Gauges:
    """`create` makes a gauge of a name and a description. `take` is for the engine's thread, `flush` for a timer."""

    def __init__(self, create: Callable[[str, str], Gauge], ready: Ready) -> None:
        self._running = create("nanoflow_running_requests", "Requests that hold KV pages")
        self._waiting = create("nanoflow_waiting_requests", "Requests in the engine's queue")
        self._used_pages = create("nanoflow_kv_used_pages", "KV pages that requests hold")
        self._cached_pages = create("nanoflow_kv_cached_pages", "KV pages kept for their content, free when needed")
        self._num_pages = create("nanoflow_kv_pages", "KV pages that there are")
        self._num_pages.set(ready.num_pages)
        self._latest: SchedulerStats | None = None
        self._shown: SchedulerStats | None = None

    def take(self, stats: SchedulerStats) -> None:
        self._latest = stats

    def flush(self) -> None:
        stats = self._latest
        if stats is not None and stats is not self._shown:
            self._running.set(stats.running_requests)
            self._waiting.set(stats.waiting_requests)
            self._used_pages.set(stats.used_pages)
            self._cached_pages.set(stats.cached_pages)
            self._shown = stats
