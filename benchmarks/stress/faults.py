"""Faults happen to a server's engine in production: it is killed, stopped for a moment or for good, or replaced."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable

import tritonclient.grpc

from benchmarks.serving import server_state
from benchmarks.stress.ledger import Ledger
from nanoflow_backend.embedded.server import EmbeddedServer

PATIENCE_S = 60.0
PAUSE_S = 1.0  # of a stopped engine that goes on; less than its engine_stall_s


class Faults:
    """Each method is one, and returns when `answers` says that the model answers as it should again."""

    def __init__(self, server: EmbeddedServer, model: str, ledger: Ledger, answers: Callable[[], bool]) -> None:
        self.recoveries_s: list[float] = []  # from the death of an engine to the next answer
        self.stalls_s: list[float] = []  # from the stop of an engine to the next answer
        self._server = server
        self._model = model
        self._ledger = ledger
        self._answers = answers
        self._admin = tritonclient.grpc.InferenceServerClient(server.grpc_url)

    def close(self) -> None:
        self._admin.close()

    def kill_engine(self) -> None:
        """SIGKILL, then until the model answers again."""
        self._kill("engine")

    def kill_rank(self) -> None:
        """The same to other ranks than the engine's own: it is to end with them."""
        self._kill("rank")

    def pause_engine(self) -> None:
        """It is stopped for less than it may be, and goes on. Raises: RuntimeError, another one has come instead."""
        pids = self._engines()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_S)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        wait_for("an engine after the pause", self._answers)
        if self._engines() != pids:
            raise RuntimeError(f"an engine that was stopped for {PAUSE_S:g} s was replaced")

    def stall_engine(self) -> None:
        """It is stopped for good; then until the model answers again, which is another process."""
        stopped_s, self._ledger.killed_s = time.monotonic(), math.inf
        pids = set(self._engines())
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_for("the end of the stopped engine", lambda: pids.isdisjoint(self._engines()))
        self._ledger.killed_s = time.monotonic()
        wait_for("an engine after the stall", self._answers)
        self.stalls_s.append(round(time.monotonic() - stopped_s, 2))

    def reload(self) -> None:
        """The server loads the model anew beside the old one, which ends when its requests have."""
        (self._server.model_repository / self._model / "1" / "engine.json").touch()
        self._admin.load_model(self._model)

    def _kill(self, role: str) -> None:
        self._ledger.killed_s = killed_s = time.monotonic()
        for pid in server_state.by_role(self._server)[role]:
            os.kill(pid, signal.SIGKILL)
        wait_for(f"an engine after the kill of its {role}", self._answers)
        self.recoveries_s.append(round(time.monotonic() - killed_s, 2))

    def _engines(self) -> list[int]:
        return server_state.by_role(self._server)["engine"]


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    """Raises: TimeoutError, it did not come within PATIENCE_S."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{what}: not within {PATIENCE_S:g} s")
        time.sleep(0.05)
