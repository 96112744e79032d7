"""A process that took the lifeline is gone when its parent is killed, whatever its own threads do."""

import os
import select
import subprocess
import sys

CHILD = """
import sys, threading, time
sys.path[:0] = {path!r}
from nanoflow_backend.serving.lifeline import end_with_parent
end_with_parent()
threading.Thread(target=time.sleep, args=(1000,)).start()
print("ready", flush=True)
"""
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(1000)
"""


def test_a_child_ends_with_its_killed_parent():
    code = CHILD.format(path=[entry for entry in sys.path if entry])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, code], stdout=subprocess.PIPE)
    child = os.pidfd_open(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    ended, _, _ = select.select([child], [], [], 30)
    os.close(child)
    assert ended
