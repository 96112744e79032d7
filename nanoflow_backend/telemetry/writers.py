"""Writers keep a model's metrics on the server's page, on threads of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_backend.process.ticker import Ticker
from nanoflow_backend.telemetry.family import Family, Kind
from nanoflow_backend.telemetry.metrics import Metrics, Page

FLUSH_PERIOD_S = 0.5  # each changed value is a round trip to the server, so a timer writes them, not every step
# From one writing of what is live to the next: with a step of the engine and its way here it is below 50 ms.
LIVE_PERIOD_S = 0.02
REST = 9  # times as long as the writing of all the others took: work that ends a hundred times a second is no load


class Writers:
    """What is live is written when the load has changed, and the others when statistics came, on another thread.

    Args:
        make_family: the server's `MetricFamily(name=, description=, kind=)`.
        labels: by name, at least those of the families' scopes.
    """

    def __init__(
        self, make_family: Any, labels: Mapping[str, str], metrics: Metrics, families: Sequence[Family]
    ) -> None:
        self._make_family, self._labels = make_family, labels
        self._made: dict[str, Any] = {}  # metrics live as long as their families do

        live = Page(self._create, metrics, [family for family in families if family.live])
        others = Page(self._create, metrics, [family for family in families if not family.live])

        def write_live() -> None:
            live.flush()
            time.sleep(LIVE_PERIOD_S)

        def write_others() -> None:
            begun_s = time.monotonic()
            others.flush()
            time.sleep(min(REST * (time.monotonic() - begun_s), FLUSH_PERIOD_S / 2))

        self._live = Ticker("live metrics", FLUSH_PERIOD_S, write_live)
        self._others = Ticker("metrics", FLUSH_PERIOD_S, write_others)

    def load_changed(self) -> None:
        self._live.wake()

    def statistics_came(self) -> None:
        """Also when the work has ended: scripts look right after their last response."""
        self._others.wake()

    def stop(self, timeout_s: float) -> None:
        self._live.stop(timeout_s)
        self._others.stop(timeout_s)

    def _create(self, family: Family, kind: Kind, name: str, labels: Mapping[str, str]) -> Any:
        if name not in self._made:
            of_server = getattr(self._make_family, kind.upper())
            self._made[name] = self._make_family(name=name, description=family.meaning, kind=of_server)
        return self._made[name].Metric(labels={**{label: self._labels[label] for label in family.scope}, **labels})
