"""Writers keep a model's metrics on the server's page, on threads of their own."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nanoflow_backend.process.ticker import Ticker
from nanoflow_backend.telemetry.families import Family, Kind
from nanoflow_backend.telemetry.metrics import Metrics, Page

FLUSH_PERIOD_S = 0.5  # each changed value is a round trip to the server, so a timer writes them, not every step
# From one writing of what is live to the next: with a step of the engine and its way here it is below 50 ms.
LIVE_PERIOD_S = 0.02


class Writers:
    """What is live is written when the load has changed, and the rest twice a second, on another thread: it is much.

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
        rest = Page(self._create, metrics, [family for family in families if not family.live])

        def write_live() -> None:
            live.flush()
            time.sleep(LIVE_PERIOD_S)

        self._live = Ticker("live metrics", FLUSH_PERIOD_S, write_live)
        self._rest = Ticker("metrics", FLUSH_PERIOD_S, rest.flush)

    def load_changed(self) -> None:
        self._live.wake()

    def work_ended(self) -> None:
        """Scripts look right after their last response."""
        self._rest.wake()

    def stop(self, timeout_s: float) -> None:
        self._live.stop(timeout_s)
        self._rest.stop(timeout_s)

    def _create(self, family: Family, kind: Kind, name: str, labels: Mapping[str, str]) -> Any:
        if name not in self._made:
            of_server = getattr(self._make_family, kind.upper())
            self._made[name] = self._make_family(name=name, description=family.meaning, kind=of_server)
        return self._made[name].Metric(labels={**{label: self._labels[label] for label in family.scope}, **labels})
