"""`nanoflow` as a user runs it: a process of its own."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from support.places import ROOT

from nanoflow_backend.__main__ import main
from nanoflow_backend.process import logs

COULD_NOT_RUN = 2


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "nanoflow_backend", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command(*arguments), env=environment(), text=True, timeout=120, **options)


def start(*arguments: str | Path, **options) -> subprocess.Popen:
    """The same, to be interrupted: a shell's background jobs, which the tests may be, are started deaf to SIGINT."""
    hears = ("env", "--default-signal=INT")
    return subprocess.Popen([*hears, *command(*arguments)], env=environment(), text=True, **options)


def run_here(*arguments: str | Path) -> subprocess.CompletedProcess:
    """The same in this process, which has imported torch already."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ),
        log_as_it_was(),
        mock.patch.object(sys, "argv", ["nanoflow", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def log_as_it_was():
    """What a command sets for its process is put back: its handler writes to a stream of its own."""
    level, handlers = logs.OURS.level, list(logs.OURS.handlers)
    yield
    logs.OURS.setLevel(level)
    logs.OURS.handlers[:] = handlers


def assert_one_line(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == COULD_NOT_RUN
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
