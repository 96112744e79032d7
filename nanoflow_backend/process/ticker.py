"""Ticker calls a function again and again, on a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Ticker:
    """Calls `action` every `period_s`, back to back while it takes longer. It outlives errors; the first is logged."""

    def __init__(self, name: str, period_s: float, action: Callable[[], None]) -> None:
        self._period_s = period_s
        self._action = action
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        complained = False
        began_s = time.monotonic()
        while not self._stopping.wait(max(0.0, self._period_s - (time.monotonic() - began_s))):
            began_s = time.monotonic()
            try:
                self._action()
            except Exception:
                if not complained:
                    log.exception("%s", self._thread.name)
                complained = True
