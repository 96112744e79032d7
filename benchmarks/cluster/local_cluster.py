"""LocalCluster is a Ray cluster of several nodes on this machine, some of which may be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from typing import Any, Self

from benchmarks.serving.server_state import processes

SOON_MISSED = {"health_check_period_ms": 500}  # a node that was killed, which would take some 15 s else
ENGINE = "ray::MapWorker"  # begins the command line of an engine's process


class LocalCluster:
    """The first node is the head, which commands join and whose files they read. While it is open, this process has the
    environment variables that nodes and commands need.

    Attributes:
        address: for --cluster; `client_address` too.
    """

    def __init__(self, nodes: int, cpus: int = 1, gpus: int = 0) -> None:
        self._environment = dict(os.environ)
        os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}  # no token in the user's home
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # for the nodes' workers
        from ray.cluster_utils import Cluster

        each: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": 128 * 2**20}
        each["include_log_monitor"] = False
        port = _free_port()
        self.client_address = f"ray://127.0.0.1:{port}"
        head = {**each, "include_dashboard": False, "ray_client_server_port": port, "_system_config": SOON_MISSED}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._workers = [self._cluster.add_node(**each) for _ in range(nodes - 1)]
        self.address: str = self._cluster.address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(Exception):  # nodes that were killed
            self._cluster.shutdown()
        os.environ.clear()
        os.environ |= self._environment

    def engines(self) -> list[list[int]]:
        """Ids of the processes with an engine on each node, those that were killed left out."""
        return [_engines(node) for node in (self._cluster.head_node, *self._workers)]

    def kill_engine(self) -> None:
        """One of those that there are: SIGKILL, as by the kernel where memory ends."""
        os.kill(next(pid for node in self.engines() for pid in node), signal.SIGKILL)

    def kill_node(self, node: int) -> None:
        """With all that runs there; not the head."""
        self._cluster.remove_node(self._workers.pop(node - 1), allow_graceful=False)


def _engines(node: Any) -> list[int]:
    (raylet,) = node.all_processes["raylet"]
    found = processes(raylet.process.pid)
    return [pid for pid, command in found.items() if command.startswith(ENGINE)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
