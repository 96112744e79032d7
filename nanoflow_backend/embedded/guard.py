"""This script owns the server's process tree, so that nothing outlives whoever started it. It needs no package.

    python -I guard.py PARENT_PID GRACE_S SHM_PREFIX RUNTIME_FOLDER COMMAND...

Everything ends when the parent closes (or writes to) this process's stdin, when the parent dies in any way, or when the
server ends by itself: SIGTERM, GRACE_S seconds, SIGKILL for whatever is left, then the shared memory and the folder go.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None)


def die_with_guard() -> None:
    """Runs in the server before exec: PDEATHSIG follows the thread that forked, and the guard has only one."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill_descendants() -> None:
    """Kill and reap children until there are none; orphaned grandchildren become children of the subreaper."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while pids := [int(pid) for pid in children.read_text().split()]:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def guard(parent_pid: int, grace_s: float, shm_prefix: str, runtime: Path, command: list[str]) -> int:
    """Run the command until it or the parent ends, clean up, and return the command's exit status as a shell would."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    parent_fd = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:
        sys.exit("the parent was gone before the server started")
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_guard)
    select.select([sys.stdin, parent_fd, os.pidfd_open(server.pid)], [], [])
    server.terminate()  # does nothing to a server that has ended
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(grace_s)
    if server.poll() is None:
        server.kill()
        server.wait()
    kill_descendants()
    for leftover in Path("/dev/shm").glob(f"{shm_prefix}*"):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(runtime, ignore_errors=True)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


if __name__ == "__main__":
    parent, grace, prefix, folder, *rest = sys.argv[1:]
    sys.exit(guard(int(parent), float(grace), prefix, Path(folder), rest))
