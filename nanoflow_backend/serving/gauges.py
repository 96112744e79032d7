"""Gauges: the state of the engine on the server's metrics page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from nanoflow_backend.engine.messages import News, Ready

FLUSH_PERIOD_S = 0.25  # each value is a round trip to the server, so a timer sets them, not every step


class Gauge(Protocol):
    def set(self, value: float) -> None: ...


class Gauges:
    """`create` makes a gauge from a name and a description. `take` is for the engine's thread, `flush` for a timer's."""

    def __init__(self, create: Callable[[str, str], Gauge], ready: Ready) -> None:
        self._running = create("nanoflow_requests_running", "Requests that hold KV pages")
        self._waiting = create("nanoflow_requests_waiting", "Requests in the engine's queue")
        self._pages_used = create("nanoflow_kv_pages_used", "KV pages that requests hold")
        self._pages = create("nanoflow_kv_pages", "KV pages that there are")
        self._pages.set(ready.num_pages)
        self._latest: tuple[int, int, int] = (0, 0, 0)
        self._shown: tuple[int, int, int] | None = None

    def take(self, news: News) -> None:
        self._latest = (news.running, news.waiting, news.pages_used)

    def flush(self) -> None:
        latest = self._latest
        if latest != self._shown:
            for gauge, value in zip((self._running, self._waiting, self._pages_used), latest, strict=True):
                gauge.set(value)
            self._shown = latest
