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
        self._stopping = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let it call now, and again `period_s` later."""
        self._woken.set()

    def stop(self, timeout_s: float) -> None:
        self._stopping = True
        self._woken.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        complained = False
        began_s = time.monotonic()
        while True:
            self._woken.wait(max(0.0, self._period_s - (time.monotonic() - began_s)))
            self._woken.clear()
            if self._stopping:
                return
            began_s = time.monotonic()
            try:
                self._action()
            except Exception:
                if not complained:
                    log.exception("%s", self._thread.name)
                complained = True
