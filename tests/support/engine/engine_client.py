"""Client: one client of an engine process, which keeps what the process says."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.engine_process import EngineProcess
from nanoflow_backend.process.messages import Heartbeat, Load, News, Refusal, Stats
from nanoflow_backend.scheduler.batch import FinishReason


class Client:
    """Collects what an EngineProcess says."""

    def __init__(self, config: EngineConfig) -> None:
        self.changed = threading.Condition()
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, FinishReason] = {}
        self.refused: dict[int, str] = {}
        self.deaths: list[str] = []
        self.heartbeats: list[Heartbeat] = []
        self.loads: list[tuple[Load, int]] = []  # with the deltas that came with them
        self.begun: list[tuple[int, list[int]]] = []  # requests, and what had come of them then
        told = Callbacks(
            self.on_news,
            self.on_stats,
            self.on_heartbeat,
            self.on_refusal,
            self.on_death,
            on_restart=lambda ready: None,
        )
        self.process = EngineProcess(config, told)
        self.stats: Stats | None = None

    def on_news(self, news: News) -> None:
        with self.changed:
            self.loads.append((news.load, len(news.deltas)))
            self.begun += [(request_id, self.tokens.get(request_id, [])) for request_id in news.begun]
            for delta in news.deltas:
                self.tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                if delta.finish_reason:
                    assert delta.request_id not in self.finished, "a request ends once"
                    self.finished[delta.request_id] = delta.finish_reason
            self.changed.notify_all()

    def on_stats(self, stats: Stats) -> None:
        with self.changed:
            self.stats = stats
            self.changed.notify_all()

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        with self.changed:
            self.heartbeats.append(heartbeat)
            self.changed.notify_all()

    def on_refusal(self, refusal: Refusal) -> None:
        with self.changed:
            self.refused[refusal.request_id] = refusal.message
            self.changed.notify_all()

    def on_death(self, how: str) -> None:
        with self.changed:
            self.deaths.append(how)
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=60)


def config(model: Path, **fields: Any) -> EngineConfig:
    return EngineConfig.resolve({"model": str(model), **fields}, relative_to=Path.cwd())
