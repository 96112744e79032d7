"""connect joins a Ray cluster, and says what keeps it from doing so."""

from __future__ import annotations

import logging
import os
import socket
from importlib.util import find_spec
from typing import Any

from nanoflow_backend.config.error import ConfigError

CLIENT_PORT = 10001  # of a cluster's head, for ray://
REACH_S = 10.0
ATTEMPTS = 3
PACKAGES = ("ray", "pandas", "pyarrow")
EXTRA = "pip install 'nanoflow-triton[cluster]'"


def connect(address: str) -> Any:
    """Return the module `ray`, connected; close with its `shutdown`.

    Args:
        address: "auto", the cluster that this machine is a node of; HOST:PORT, of its head, from one of its nodes; or
            ray://HOST or ray://HOST:PORT, from anywhere.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ConfigError(f"cluster: expected {', '.join(missing)}, which the extra `cluster` brings: {EXTRA}")
    import ray

    if address != "auto":
        address = _reachable(address)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
            return ray
        except (ConnectionError, RuntimeError, ValueError) as error:
            # The server for clients starts a process for each, which does not always succeed.
            if attempt == ATTEMPTS or not address.startswith("ray://"):
                told = " ".join(str(error).split())
                raise ConfigError(f"cluster: expected a Ray cluster at {address}: {told}") from None


def _reachable(address: str) -> str:
    """The address with a port, at which something listens: Ray itself would try for minutes."""
    client = address.startswith("ray://")
    host, _, port = address.removeprefix("ray://").partition(":")
    port = port or (str(CLIENT_PORT) if client else "")
    if not host or not port.isdigit():
        raise ConfigError(f"cluster: expected auto, HOST:PORT or ray://HOST, got {address}")
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ConfigError(f"cluster: {host}:{port} cannot be reached: {error.strerror or error}") from None
    return f"{'ray://' * client}{host}:{port}"
