"""Child is a process of ours that ends when we end; one socket pair joins it to us.

Messages are msgspec bytes, never pickle. The socket has no name in any file system, and its end of file is the
lifeline: whichever side dies, the kernel tells the other at once, even after SIGKILL.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from nanoflow_backend.process.channel import ChannelClosed

log = logging.getLogger(__name__)
_encoder = msgspec.msgpack.Encoder()
PACKAGES = ("nanoflow_backend", "nanoflow_kernels")
END_S = 1.5  # from the end of a process's socket to its own: who waits for it is to know in two seconds
# torch's CPU threads spin while they wait. On 2 cores beside other work the demo model then took 18 to 20 times as
# long as with threads that sleep.
THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def encode(message: msgspec.Struct) -> bytes:
    """What goes over the socket."""
    return _encoder.encode(message)


class ChildDied(ChannelClosed):
    """The process at the other end of the socket is gone."""


class Child:
    """`python -m module`, running: a Channel to it.

    With `host_pid`, the child also watches that process (a stub's server): when it ends, the child kills us and ends.
    With `group`, what the child has started is killed with it: of that, a stopped process would not notice its end.
    """

    def __init__(
        self, module: str, python: str | None = None, host_pid: int | None = None, group: bool = False
    ) -> None:
        """Raises: OSError where there is no such interpreter."""
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as inherited:
            fds = [inherited.enter_context(theirs).fileno()]
            if host_pid is not None:
                fds.append(os.pidfd_open(host_pid))
                inherited.callback(os.close, fds[1])
            self._process = subprocess.Popen(
                [python or sys.executable, "-P", "-m", module, *map(str, fds)],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env=_environment(python),
                process_group=0 if group else None,
            )
        self._group = group
        self._connection = Connection(ours.detach())
        self._sending = threading.Lock()
        self._killed_for = ""

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: msgspec.Struct) -> None:
        """Raises: ChildDied."""
        self.send_bytes(encode(message))

    def send_bytes(self, message: bytes) -> None:
        """Waits until the socket has room for it. Raises: ChildDied."""
        try:
            with self._sending:
                self._connection.send_bytes(message)
        except OSError:
            raise ChildDied(self.how_it_ended()) from None

    def receive(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        """The next message, waiting for it. Raises: ChildDied."""
        try:
            return decoder.decode(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise ChildDied(self.how_it_ended()) from None

    def how_it_ended(self) -> str:
        """Wait for the end and say what it was: the socket closes moments before the process is gone."""
        if self._killed_for:
            return f"process {self.pid} was killed: {self._killed_for}"
        try:
            code = self._process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self._kill()
            return f"process {self.pid} closed its socket and was killed"
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"process {self.pid} ended with {cause}"

    def stop(self, timeout_s: float = 5.0) -> None:
        """Wait for an end that was asked for; enforce it after `timeout_s`."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._kill()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._hang_up()  # it is in a call of the kernel, as of a driver, and cannot end before that returns
                log.error("process %d does not end, though it was killed: what it holds is not free", self.pid)

    def kill(self, why: str = "") -> None:
        """End it at once. Whoever is in `receive` or `send` hears of it, and `why`, even if the process cannot end."""
        self._killed_for = why
        self._kill()
        self._hang_up()

    def close(self) -> None:
        """End the conversation. A mere close would leave it open for as long as another thread is in `receive`."""
        self._hang_up()
        self._connection.close()

    def _kill(self) -> None:
        if self._group and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended just now
                os.killpg(self.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)


class Parent:
    """The other end: what a child's main function talks to. The process ends when its parent does.

    Sending is thread-safe; receiving is for one thread.

    Attributes:
        on_end: called just before that, from any thread, or from two.
    """

    def __init__(self) -> None:
        self.on_end: Callable[[], None] = lambda: None
        self._connection = Connection(int(sys.argv[1]))
        self._sending = threading.Lock()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then tells us
        threading.Thread(target=self._end_with_parent, name="lifeline", daemon=True).start()

    def _end_with_parent(self) -> None:
        parent_pid = os.getppid()
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLRDHUP)
        for host in sys.argv[2:]:
            poll.register(int(host), select.POLLIN)
        if self._connection.fileno() not in dict(poll.poll()):
            # Only the host is gone. Our parent may be frozen: a call that waits for the host can hold its interpreter.
            os.kill(parent_pid, signal.SIGKILL)
        self._end()  # also from inside a collective or a long load

    def send(self, message: msgspec.Struct) -> None:
        encoded = encode(message)
        with self._sending:
            self._connection.send_bytes(encoded)

    def receive(self, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
        """The next message, waiting for it. At the end of the conversation this process ends, as by the lifeline."""
        try:
            message = self._connection.recv_bytes()
        except (EOFError, OSError):
            self._end()
        return decoder.decode(message)

    def _end(self) -> NoReturn:
        self.on_end()
        os._exit(1)

    def has_message(self) -> bool:
        return self._connection.poll(0)


def _environment(python: str | None) -> dict[str, str]:
    """Our own interpreter runs the code that we run, also from a checkout that is not installed. Another
    interpreter has its own installation: our folders would bring packages built for this one."""
    environment = {**THREADS_SLEEP, **os.environ}
    if python is None or python == sys.executable:
        specs = [find_spec(name) for name in PACKAGES]
        folders = [str(Path(spec.origin).parent.parent) for spec in specs if spec and spec.origin]
        inherited = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*dict.fromkeys(folders), *([inherited] if inherited else [])])
    return environment
