"""This tells what a server holds on to: memory, descriptors and shared memory of its processes, and its metrics."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import time
from collections import defaultdict
from pathlib import Path

from nanoflow_backend.embedded.server import EmbeddedServer

# By a word of the command line. What else there is (guard, helpers of the allocator) is small and lives as long.
ROLES = {
    "tritonserver": "/bin/tritonserver",
    "stub": "triton_python_backend_stub",
    "engine": "engine.loop",
    "rank": "engine.ranks",
}

# The sockets that the kernel lists, in /proc/PID/net.
INODE_COLUMNS = {"tcp": 9, "tcp6": 9, "udp": 9, "udp6": 9, "unix": 6, "netlink": 9, "packet": 8}


def processes(root: int) -> dict[int, str]:
    """Ids and command lines of a process and all that descend from it."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # they end while we look
        found[root] = Path(f"/proc/{root}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for task in Path(f"/proc/{root}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in (task / "children").read_text().split():
                    found |= processes(int(child))
    return found


def by_role(server: EmbeddedServer) -> dict[str, list[int]]:
    found = defaultdict(list)
    for pid, command in processes(server.pid).items():
        for role, word in ROLES.items():
            if word in command and "guard.py" not in command:
                found[role].append(pid)
    return found


def dead_sockets(pid: int) -> set[str]:
    """Inodes of a process's sockets that are in no table of the kernel: their connection has ended, and is not closed.

    A socket is so for a moment after a client's reset, until its owner has read of it. One that stays so is lost.
    """
    held = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(descriptor)):
                held.add(match[1])
    for table, column in INODE_COLUMNS.items():
        held -= {line.split()[column] for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]}
    return held


def sample(server: EmbeddedServer) -> dict[str, float]:
    """Of each role: processes, RSS in MiB, descriptors; and MiB of shared memory.

    Sockets that the server lost are counted apart from its other descriptors.
    """
    values: dict[str, float] = {}
    for role, pids in by_role(server).items():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
            values[f"{role}_processes"] = len(pids)
            values[f"{role}_rss_mib"] = round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
            values[f"{role}_fds"] = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
            if role == "tritonserver":
                values["lost_sockets"] = lost = sum(_lost_sockets(pid) for pid in pids)
                values[f"{role}_fds"] -= lost
    segments = Path("/dev/shm").glob(f"{server.shm_prefix}*")
    values["shm_mib"] = round(sum(segment.stat().st_blocks * 512 for segment in segments) / 2**20, 2)
    return values


def _lost_sockets(pid: int) -> int:
    if dead := dead_sockets(pid):
        time.sleep(1)
        dead &= dead_sockets(pid)
    return len(dead)


def cpu_s(server: EmbeddedServer) -> dict[str, float]:
    """CPU time of each role so far."""
    used = {}
    for role, pids in by_role(server).items():
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        used[role] = sum(int(of_one[11]) + int(of_one[12]) for of_one in fields) / os.sysconf("SC_CLK_TCK")
    return used


def metrics(server: EmbeddedServer, model: str) -> dict[str, float]:
    """The values on the server's page that are of a model, summed over their other labels."""
    with contextlib.closing(http.client.HTTPConnection(server.metrics_url, timeout=30)) as connection:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    values: defaultdict[str, float] = defaultdict(float)
    for line in page.splitlines():
        if (match := re.match(r"(\w[\w:]*)\{(.*)\} (\S+)$", line)) and f'model="{model}"' in match[2]:
            values[match[1]] += float(match[3])
    return dict(values)
