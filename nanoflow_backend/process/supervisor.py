"""Supervisor is an engine process that is started again when it dies."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process.callbacks import Callbacks
from nanoflow_backend.process.engine_process import EngineError, EngineProcess
from nanoflow_backend.process.messages import Ready
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import FinishReason

log = logging.getLogger(__name__)

FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 60.0  # before a restart: twice as long each time
STABLE_S = LONGEST_DELAY_S  # an engine that has lived so long died of something new


class Supervisor:
    """Like an EngineProcess (see there), and one again after each death. There is no torch in this process.

    Whatever ran when the process died is lost: `on_death` hears of it at once, and fails it. `on_restart` hears of the
    next process before anything of it. Until the next process is ready, requests are refused with an EngineError: a
    client, or what balances its load, knows better than a queue here whether to wait or to go elsewhere. After
    `max_engine_restarts` in a row, of which none lived for STABLE_S, or a stop, nothing is started any more.
    """

    def __init__(self, config: EngineConfig, callbacks: Callbacks, host_pid: int | None = None) -> None:
        self._max_restarts = config.max_engine_restarts
        self._callbacks = callbacks
        of_process = replace(callbacks, on_death=self._died)
        self._make: Callable[[], EngineProcess] = lambda: EngineProcess(config, of_process, host_pid)
        self._engine = self._make()
        self._changing = threading.Lock()  # of `_engine`, against a stop
        self._stopping = threading.Event()
        self._restarting: threading.Thread | None = None
        self._failures = 0  # in a row
        self._ready_since_s = 0.0
        self._down: str | None = "the engine was not started"  # None: it is ready; else what to tell clients

    def start(self) -> Ready:
        """Wait until every rank is ready. Raises: EngineError, what failed; the first start is not tried again."""
        ready = self._engine.start()
        self._up()
        return ready

    @property
    def is_ready(self) -> bool:
        return self._down is None

    def check_room(self) -> None:
        """Raises: EngineError or QueueFull, where a request would be refused now."""
        if self._down is not None:
            raise EngineError(self._down)
        self._engine.check_room()

    def submit(self, request: Request) -> None:
        """Raises: EngineError."""
        self._engine.submit(request)

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED, index: int | None = None) -> None:
        """Raises: EngineError."""
        self._engine.cancel(request_id, reason, index)

    def stop(self) -> None:
        """End the process, also one that is being started. Harmless when repeated."""
        with self._changing:
            self._stopping.set()
            self._down = "the engine was stopped"
        self._engine.stop()
        if self._restarting is not None:
            self._restarting.join()

    def _up(self) -> None:
        self._ready_since_s = time.monotonic()
        with self._changing:
            if not self._stopping.is_set():
                self._down = None

    def _died(self, how: str) -> None:
        """On the reader thread of the process that is gone."""
        if time.monotonic() - self._ready_since_s > STABLE_S:
            self._failures = 0
        self._fail(how)
        self._callbacks.on_death(self._down or how)
        self._restarting = threading.Thread(target=self._restart, args=(self._engine,), name="restart", daemon=True)
        self._restarting.start()

    def _fail(self, how: str) -> None:
        self._failures += 1
        what_next = (
            f"restart {self._failures} of {self._max_restarts} is under way: try again later"
            if self._failures <= self._max_restarts
            else f"it was restarted {self._max_restarts} times (max_engine_restarts): reload the model"
        )
        with self._changing:
            if not self._stopping.is_set():
                self._down = f"the engine is gone: {how}; {what_next}"

    def _restart(self, dead: EngineProcess) -> None:
        dead.stop()
        while self._failures <= self._max_restarts:
            if self._stopping.wait(min(FIRST_DELAY_S * 2 ** (self._failures - 1), LONGEST_DELAY_S)):
                return
            with self._changing:
                if self._stopping.is_set():
                    return
                self._engine = self._make()
            try:
                ready = self._engine.start()
            except EngineError as error:
                if self._stopping.is_set():
                    return
                self._fail(str(error))
                log.error("%s", self._down)
            else:
                self._callbacks.on_restart(ready)
                self._up()
                log.warning("the engine runs again after restart %d", self._failures)
                return
