"""Metrics collects what is known of the engine, and Page writes it to the server's metrics page.

The server's histograms take one value a call, and a step brings a thousand. So a histogram is here what its exposition
consists of: counters with an `le` label, raised a bucket at a time. To a query they are the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import msgspec

from nanoflow_backend.process.messages import Load, Ready, Stats
from nanoflow_backend.scheduler.observed import Histogram, Observed
from nanoflow_backend.scheduler.stats import SchedulerStats
from nanoflow_backend.telemetry.families import FAMILIES, refused_by_engine
from nanoflow_backend.telemetry.family import Family, Kind, View

IDLE = Load(0, 0, 0, 0, 0)


class Metrics:
    """Told from any thread."""

    def __init__(self, ready: Ready, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._view = View(ready, _nothing(ready), IDLE)
        self._heard_s = clock()

    def take(self, stats: Stats) -> None:
        with self._lock:
            self._view.stats = stats
            self._heard_s = self._clock()

    def carry(self, load: Load) -> bool:
        """What the engine has to do now; whether gauges have changed by it."""
        with self._lock:
            before, self._view.load = self._view.load, load
        return before.running != load.running or before.waiting != load.waiting or before.used_pages != load.used_pages

    def confirm(self) -> None:
        """The last statistics are still how things stand."""
        with self._lock:
            self._heard_s = self._clock()

    def refused(self, reason: str, requests: int = 1) -> None:
        """They get no result. Any reason will do; those that the engine ends count by themselves."""
        with self._lock:
            self._view.refused[reason] += requests

    def queued(self, n: int) -> None:
        """A prompt with `n` sequences is on its way to the engine."""
        with self._lock:
            self._view.asked_n.observe(n)

    def engine_died(self) -> None:
        with self._lock:
            self._view.up = False

    def engine_restarted(self, ready: Ready) -> None:
        """To be told before its first statistics, which count from zero."""
        with self._lock:
            view = self._view
            view.refused.update(refused_by_engine(view.stats))
            view.ready, view.stats, view.load, view.up = ready, _nothing(ready), IDLE, True
            view.restarts += 1
            self._heard_s = self._clock()

    def view(self) -> View:
        """As it is now."""
        with self._lock:
            view, asked_n = self._view, self._view.asked_n
            own_n = Histogram(asked_n.bounds, asked_n.counts.copy(), asked_n.total)
            age_s = self._clock() - self._heard_s
            return msgspec.structs.replace(view, refused=view.refused.copy(), asked_n=own_n, age_s=age_s)


def _nothing(ready: Ready) -> Stats:
    zeros: dict[str, Any] = {field.name: 0 for field in msgspec.structs.fields(SchedulerStats) if field.required}
    return Stats(SchedulerStats(**zeros | {"num_pages": ready.num_pages}), Observed())


class Metric(Protocol):
    """The server's. Each call is a round trip."""

    def set(self, value: float) -> None: ...

    def increment(self, value: float) -> None: ...


Create = Callable[[Family, Kind, str, Mapping[str, str]], Metric]  # kind (no histogram), name, labels beside its scope


class _Shown:
    """A family on the page: its series, and the values that they have there."""

    def __init__(self, create: Create, family: Family) -> None:
        self._create, self.family = create, family
        self._metrics: dict[tuple[str, ...], Metric] = {}
        self._values: dict[tuple[str, ...], float] = {}

    def show(self, view: View) -> None:
        read = self.family.read(view)
        if isinstance(read, Histogram):
            values = _exposition(read, self.family.bounds or read.bounds)
        elif isinstance(read, Mapping):
            values = {("", *labels): value for labels, value in read.items()}
        else:
            values = {("",): read}
        if self.family.kind == "gauge":  # the server keeps a series for good
            values = {**dict.fromkeys(self._values, 0), **values}
        for series, value in values.items():
            metric = self._metrics.get(series) or self._add(series)
            if value != self._values[series]:
                if self.family.kind == "gauge":
                    metric.set(value)
                else:
                    metric.increment(value - self._values[series])
                self._values[series] = value

    def begin_again(self) -> None:
        """The engine's counts start at zero again; those on the page go on."""
        if self.family.kind != "gauge" and not self.family.of_stub:
            self._values = dict.fromkeys(self._values, 0)

    def _add(self, series: tuple[str, ...]) -> Metric:
        suffix, *values = series
        names = ("le",) if suffix == "_bucket" else self.family.labels
        kind: Kind = "gauge" if self.family.kind == "gauge" else "counter"
        labels = dict(zip(names, values, strict=True))
        metric = self._metrics[series] = self._create(self.family, kind, self.family.name + suffix, labels)
        self._values[series] = 0
        return metric


def _exposition(histogram: Histogram, shown: Sequence[float]) -> dict[tuple[str, ...], float]:
    """(suffix, le): value, as Prometheus defines a histogram: each bucket counts those below it too.

    The widest comes first: the server lists up to 13 series of a name in the reverse order of their making, so that
    the last line of a name is the one of all, as in a histogram of the server.
    """
    below = dict(zip(histogram.bounds, accumulate(histogram.counts), strict=False))
    buckets = {f"{bound:.9g}": below[bound] for bound in reversed(shown)}
    count = sum(histogram.counts)
    values: dict[tuple[str, ...], float] = {("_bucket", le): n for le, n in {"+Inf": count, **buckets}.items()}
    return {**values, ("_sum",): histogram.total, ("_count",): count}


class Page:
    """The metrics on the server's page. For one thread."""

    def __init__(self, create: Create, metrics: Metrics, families: Sequence[Family] = FAMILIES) -> None:
        self._metrics = metrics
        self._shown = [_Shown(create, family) for family in families]
        self._restarts = 0
        self.flush()

    def flush(self) -> None:
        """Write what has changed."""
        view = self._metrics.view()
        if view.restarts != self._restarts:
            self._restarts = view.restarts
            for shown in self._shown:
                shown.begin_again()
        for shown in self._shown:
            shown.show(view)
