"""A stand-in for the server's metrics page, and what is shown on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nanoflow_backend.process.messages import Load, Ready, Stats
from nanoflow_backend.scheduler.observed import Observed
from nanoflow_backend.scheduler.stats import SchedulerStats
from nanoflow_backend.telemetry.family import Family
from nanoflow_backend.telemetry.metrics import Metrics, Page

READY = Ready(
    vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, max_running=8, description="fake", queue_room=9
)
LABELS = {"model": "m", "version": "1", "model_name": "m", "engine": "m_0_0"}


class ServerPage:
    """Refuses what the real one refuses, counts the calls, and has its text."""

    def __init__(self, labels: Mapping[str, str] = LABELS) -> None:
        self.series: dict[tuple[str, ...], float] = {}
        self.kinds: dict[str, str] = {}
        self.calls = 0
        self._labels = labels
        self._lines: dict[str, dict[str, tuple[str, ...]]] = {}

    def create(self, family: Family, kind: str, name: str, labels: Mapping[str, str]) -> Any:
        assert self.kinds.setdefault(name, kind) == kind
        key = (name, *(f"{label}={value}" for label, value in labels.items()))
        assert key not in self.series, f"{key} is made twice"
        self.series[key] = 0.0
        whole = sorted({**{label: self._labels[label] for label in family.scope}, **labels}.items())
        text = ",".join(f'{label}="{value}"' for label, value in whole)
        head = f"# HELP {name} {family.meaning}\n# TYPE {name} {kind}"
        self._lines.setdefault(head, {})[f"{name}{{{text}}}"] = key
        return _Metric(self, kind, key)

    def value(self, name: str, *labels: str) -> float:
        return self.series[name, *labels]

    def text(self) -> str:
        """As the server writes it, the series of a name that was made last first."""
        lines = []
        for head, series in self._lines.items():
            lines += [head, *(f"{line} {self.series[key]:g}" for line, key in reversed(series.items()))]
        return "\n".join(lines) + "\n"


class _Metric:
    def __init__(self, server: ServerPage, kind: str, key: tuple[str, ...]) -> None:
        self.server, self.kind, self.key = server, kind, key

    def set(self, value: float) -> None:
        assert self.kind == "gauge", "the server raises here"
        self.server.calls += 1
        self.server.series[self.key] = value

    def increment(self, value: float) -> None:
        assert self.kind == "gauge" or value >= 0, "the server raises here"
        self.server.calls += 1
        self.server.series[self.key] += value


def stats(observed: Observed | None = None, **scheduler: int) -> Stats:
    fields = {**dict.fromkeys(SchedulerStats.__struct_fields__, 0), "num_pages": 10, **scheduler}
    return Stats(SchedulerStats(**fields), observed or Observed())


def load(running: int = 0, waiting: int = 0, used_pages: int = 0) -> Load:
    return Load(running, waiting, used_pages, room=9, received=0)


def text_of(families: Iterable[Family], carried: Load, told: Stats, labels: Mapping[str, str] = LABELS) -> str:
    """The page of a model that shows `families`."""
    server, metrics = ServerPage(labels), Metrics(READY)
    metrics.carry(carried)
    metrics.take(told)
    Page(server.create, metrics, list(families))
    return server.text()
