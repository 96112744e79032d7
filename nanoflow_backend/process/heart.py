"""Heart sends the heartbeats of an engine process."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from nanoflow_backend.process.messages import STATS_PERIOD_S, Heartbeat
from nanoflow_backend.process.ticker import Ticker


class Heart:
    """Beats on a thread of its own, so also in a step that is stuck; the loop says how far it has come.

    Attributes:
        steps: of the engine, that came back.
        idle: the loop waits for messages, with nothing to compute.
    """

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        self.steps = 0
        self.idle = False
        Ticker("heartbeat", STATS_PERIOD_S, lambda: send(Heartbeat(self.steps, self.idle)))
