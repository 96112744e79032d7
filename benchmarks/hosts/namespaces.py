"""Two hosts on one machine: network namespaces that a cable joins, or, where those are not allowed, loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from types import TracebackType
from typing import Protocol


class Hosts(Protocol):
    """Where leader and other host run.

    Attributes:
        kind: what they are, in words.
        addresses: of the leader and the other host.
        prefixes: of a command, to run it on either.
        port: of the leader that is free.
    """

    kind: str
    addresses: tuple[str, str]
    prefixes: tuple[list[str], list[str]]
    port: int

    def cut(self, other: subprocess.Popen[bytes]) -> None:
        """Let nothing pass any more, and say so to neither; `other` is the process that joined the leader."""
        ...

    def mend(self, other: subprocess.Popen[bytes]) -> None: ...

    def __enter__(self) -> Hosts: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Namespaces:
    """See Hosts. A pair of virtual network devices is the cable.

    Raises: OSError, this process may not make them, as in most containers.
    """

    kind = "two network namespaces"
    addresses = ("10.213.77.1", "10.213.77.2")
    port = 29400

    def __init__(self) -> None:
        if shutil.which("ip") is None:
            raise OSError("expected ip (iproute2) on the path")
        self._names = (f"nanoflow-{os.getpid()}-a", f"nanoflow-{os.getpid()}-b")
        a, b = self._names
        self.prefixes = (["ip", "netns", "exec", a], ["ip", "netns", "exec", b])
        try:
            for name in self._names:
                _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
            for name, address in zip(self._names, self.addresses, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                for device in ("lo", "eth0"):
                    _ip("-n", name, "link", "set", device, "up")
        except OSError:
            self._delete()
            raise

    def cut(self, other: subprocess.Popen[bytes]) -> None:
        _ip("-n", self._names[0], "link", "set", "eth0", "down")

    def mend(self, other: subprocess.Popen[bytes]) -> None:
        _ip("-n", self._names[0], "link", "set", "eth0", "up")

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._delete()

    def _delete(self) -> None:
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Loopback:
    """See Hosts. A host that is stopped says as little as one behind a cable that is cut."""

    kind = "loopback"
    addresses = ("127.0.0.1", "127.0.0.1")
    prefixes: tuple[list[str], list[str]] = ([], [])

    def __init__(self) -> None:
        with socket.create_server((self.addresses[0], 0)) as free:
            self.port = int(free.getsockname()[1])

    def cut(self, other: subprocess.Popen[bytes]) -> None:
        other.send_signal(signal.SIGSTOP)

    def mend(self, other: subprocess.Popen[bytes]) -> None:
        other.send_signal(signal.SIGCONT)

    def __enter__(self) -> Loopback:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def two_hosts() -> Hosts:
    """Namespaces where they are allowed, else loopback."""
    try:
        return Namespaces()
    except OSError:
        return Loopback()


def _ip(*words: str) -> None:
    result = subprocess.run(["ip", *words], capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"ip {' '.join(words)}: {result.stderr.strip()}")
