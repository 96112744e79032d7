"""Group is one engine with a rank on each of two hosts, as users run it: engine.json here, `nanoflow rank` there."""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.hosts.leader import TOKENS
from benchmarks.hosts.namespaces import Hosts


class Group:
    """Its leader runs from entering to leaving it, the other host from `join` on.

    Args:
        folder: for the secret, settings and logs.
        model: the leader's folder; the other host has `models_copy`.
        hosts: where it runs.
        settings: of engine.json, beyond those of the group.

    Attributes:
        loaded_tokens: of the prompts that were completed, those that came from host memory.
    """

    def __init__(self, folder: Path, model: Path, models_copy: Path, hosts: Hosts, **settings: Any) -> None:
        self._folder = folder
        self._hosts = hosts
        self._copy = models_copy
        self._address = f"{hosts.addresses[0]}:{hosts.port}"
        self._secret = folder / "secret"
        self._secret.touch(0o600)
        self._secret.write_text(secrets.token_hex(32))
        group = {"tensor_parallel": 2, "hosts": 2, "leader_address": self._address, "secret_file": str(self._secret)}
        self._settings = folder / "engine.json"
        self._settings.write_text(json.dumps({"model": str(model), "device": "cpu", **group, **settings}))
        self.loaded_tokens = 0
        self._other: subprocess.Popen[bytes] | None = None
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()

    def __enter__(self) -> Group:
        with (self._folder / "leader.log").open("wb") as log:
            self._leader = subprocess.Popen(
                [*self._hosts.prefixes[0], sys.executable, "-m", "benchmarks.hosts.leader", str(self._settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._leader.stdin is not None
        with contextlib.suppress(OSError):
            self._leader.stdin.close()  # it stops its engine, and ends
        if self._other is not None:
            self._hosts.mend(self._other)
            self._other.terminate()
        for process in filter(None, (self._leader, self._other)):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def join(self) -> None:
        self._other = self._host(self._secret, "other.log")

    @property
    def other_pid(self) -> int:
        """Of `nanoflow rank`."""
        return self._joined.pid

    @property
    def _joined(self) -> subprocess.Popen[bytes]:
        if self._other is None:
            raise RuntimeError("the other host has not joined")
        return self._other

    def wait_for(self, event: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next event. Raises: RuntimeError, it is another one, or there is none."""
        try:
            found = self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise RuntimeError(f"waited {timeout_s:g} s for {event!r}; {self._logs()}") from None
        if found["event"] != event:
            raise RuntimeError(f"waited for {event!r}, got {found}; {self._logs()}")
        return found

    def complete(self, prompts: list[list[int]]) -> list[list[int]]:
        """TOKENS greedy ones of each. Raises: RuntimeError."""
        self.submit(prompts, TOKENS)
        event = self.wait_for("tokens")
        self.loaded_tokens = event["loaded_tokens"]
        tokens: list[list[int]] = event["tokens"]
        return tokens

    def submit(self, prompts: list[list[int]], max_tokens: int) -> None:
        assert self._leader.stdin is not None
        self._leader.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}).encode() + b"\n")
        self._leader.stdin.flush()

    def cut(self) -> None:
        self._hosts.cut(self._joined)

    def mend(self) -> None:
        self._hosts.mend(self._joined)

    def join_with_another_secret(self) -> str:
        """What `nanoflow rank` says, which must end; before `join`, for afterwards the leader listens to nobody."""
        another = self._folder / "another"
        another.touch(0o600)
        another.write_text(secrets.token_hex(32))
        wrong = self._host(another, "wrong.log")
        wrong.wait(60)
        return (self._folder / "wrong.log").read_text()

    def _host(self, secret: Path, log: str) -> subprocess.Popen[bytes]:
        words = ["--leader", self._address, "--secret-file", str(secret), "--node-rank", "1", "--join-timeout", "60"]
        command = [sys.executable, "-m", "nanoflow_backend", "rank", "--model", str(self._copy), *words]
        with (self._folder / log).open("wb") as output:
            return subprocess.Popen([*self._hosts.prefixes[1], *command], stdout=output, stderr=output)

    def _listen(self) -> None:
        assert self._leader.stdout is not None
        for line in self._leader.stdout:
            self._events.put(json.loads(line))

    def _logs(self) -> str:
        return "\n".join(f"{name}:\n{(self._folder / name).read_text()}" for name in ("leader.log", "other.log"))
