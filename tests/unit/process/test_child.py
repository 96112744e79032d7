"""Lifelines: who ends when someone else is killed; and a child that cannot end."""

import logging
import os
import select
import signal
import subprocess
import sys
import threading

import msgspec
import pytest

from nanoflow_backend.process.child import Child, ChildDied

CHILD = """
import time
from nanoflow_backend.process.child import Parent
Parent()
time.sleep(1000)
"""
TIDY_CHILD = """
import msgspec, time
from pathlib import Path
from nanoflow_backend.process.child import Parent
parent = Parent()
note = Path(parent.receive(msgspec.msgpack.Decoder()))
parent.on_end = lambda: note.write_text("done")
parent.send("ready")
{waits}
"""
STUB = """
import ctypes, sys
from nanoflow_backend.process.child import Child
child = Child("waiting_child", host_pid=int(sys.argv[1]))
print(child.pid, flush=True)
ctypes.PyDLL(None).sleep(1000)  # with the interpreter lock held
"""


def ended(pidfd):
    return bool(select.select([pidfd], [], [], 30)[0])


def test_a_killed_host_takes_a_frozen_stub_and_its_child_along(tmp_path):
    (tmp_path / "waiting_child.py").write_text(CHILD)
    path = os.pathsep.join([str(tmp_path), *(entry for entry in sys.path if entry)])
    host = subprocess.Popen(["sleep", "1000"])
    stub = subprocess.Popen(
        [sys.executable, "-c", STUB, str(host.pid)], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    )
    child = os.pidfd_open(int(stub.stdout.readline()))
    assert stub.poll() is None
    host.kill()
    host.wait()
    assert ended(child)
    assert stub.wait(30) == -9
    os.close(child)
    stub.stdout.close()


def test_a_child_does_what_it_has_to_before_it_ends_with_its_parent(tmp_path, monkeypatch):
    """Whether its main thread waits for a message or does something else."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for waits in ("time.sleep(1000)", "parent.receive(msgspec.msgpack.Decoder())"):
        (tmp_path / "tidy_child.py").write_text(TIDY_CHILD.format(waits=waits))
        child, note = Child("tidy_child"), tmp_path / "note"
        child.send_bytes(msgspec.msgpack.encode(str(note)))
        assert child.receive(msgspec.msgpack.Decoder()) == "ready"
        child.close()
        child.stop()
        assert note.read_text() == "done"
        note.unlink()


def test_a_child_that_hangs_in_the_kernel_is_given_up(tmp_path, monkeypatch, caplog):
    """No signal ends such a process. This one is stopped, and only never killed."""
    (tmp_path / "waiting_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    child = Child("waiting_child")
    ended, really_kill = [], child._process.kill
    monkeypatch.setattr(child._process, "kill", lambda: None)
    os.kill(child.pid, signal.SIGSTOP)

    def read():
        with pytest.raises(ChildDied) as death:
            child.receive(msgspec.msgpack.Decoder())
        ended.append(str(death.value))

    reader = threading.Thread(target=read)
    reader.start()
    child.kill("it made no step")
    reader.join(30)
    assert ended == [f"process {child.pid} was killed: it made no step"]
    with caplog.at_level(logging.ERROR):
        child.stop(timeout_s=0.01)
    assert f"process {child.pid} does not end, though it was killed" in caplog.text
    really_kill()
    child.close()
