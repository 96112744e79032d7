"""Lifelines: who ends when someone else is killed."""

import os
import select
import subprocess
import sys

CHILD = """
import time
from nanoflow_backend.process.child import Parent
Parent()
time.sleep(1000)
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
