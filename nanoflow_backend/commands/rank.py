"""`nanoflow rank` runs this host's ranks of an engine whose leader is on another host."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from nanoflow_backend.commands.settings import parse
from nanoflow_backend.hosts.address import host_number, leader_address
from nanoflow_backend.hosts.host import Host
from nanoflow_backend.hosts.secret import Secret
from nanoflow_backend.process import logs

STOPPED = 130  # the exit status, as shells have it for Ctrl-C


def rank(
    model: Path,
    leader: str | None,
    secret_file: Path,
    node_rank: int | None,
    join_timeout_s: float,
    settings: Sequence[str],
) -> int:
    """Until it is stopped: by Ctrl-C at once, by SIGTERM when the leader has gone, too. The exit status.

    Raises: ConfigError, the leader and this host do not agree, or there was no leader for `join_timeout_s`.
    """
    logs.configure()
    where = leader_address(leader, os.environ, "--leader")
    number = host_number(node_rank, os.environ)
    host = Host(model, where, number, Secret(secret_file), join_timeout_s, parse(settings))
    signal.signal(signal.SIGTERM, lambda *_: host.leave())  # where hosts are stopped together, the leader drains first
    with contextlib.suppress(KeyboardInterrupt):
        host.run()
        return 0
    return STOPPED
