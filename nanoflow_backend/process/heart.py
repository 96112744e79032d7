"""Heart sends the heartbeats of an engine process, and its load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from nanoflow_backend.process.messages import LOAD_PERIOD_S, STATS_PERIOD_S, Heartbeat, Load
from nanoflow_backend.process.ticker import Ticker


class Heart:
    """Works on threads of its own, so also in a step that is long or stuck; the loop says how far it has come.

    Attributes:
        steps: of the engine, that came back.
        idle: the loop waits for messages, with nothing to compute.
    """

    def __init__(self, send: Callable[[msgspec.Struct], None]) -> None:
        self.steps = 0
        self.idle = False
        self._send = send
        self._load = (0, 0, 0)  # a tuple: it is made twice a step, and sent once in many
        self._load_changed = threading.Event()
        Ticker("heartbeat", STATS_PERIOD_S, lambda: send(Heartbeat(self.steps, self.idle)))
        threading.Thread(target=self._tell_loads, name="load", daemon=True).start()

    def carry(self, load: tuple[int, int, int]) -> None:
        """The engine's load is this now: the values of a `Load`."""
        if load != self._load:
            self._load = load
            self._load_changed.set()

    def _tell_loads(self) -> None:
        while True:
            self._load_changed.wait()
            self._load_changed.clear()
            self._send(Load(*self._load))
            time.sleep(LOAD_PERIOD_S)
