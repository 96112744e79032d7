"""This module joins the ranks of an engine to torch.distributed's default process group, and lets them agree on ints.

The group is of gloo on every device: it is the way by which ranks meet, whatever they exchange rows with afterwards.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

LOOPBACK = "lo"
INTERFACE = "GLOO_SOCKET_IFNAME"
INTERFACES = (INTERFACE, "NCCL_SOCKET_IFNAME")
# A rank that dies closes its connections, which the others notice at once; of a lost link the rank channel hears.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


def open_store(rendezvous: str, size: int, timeout: timedelta, listening: socket.socket | None = None) -> Any:
    """What the members of a group find each other by.

    Args:
        rendezvous: a file, or HOST:PORT, where rank 0 listens.
        timeout: until there is one at HOST:PORT.
        listening: rank 0's socket at HOST:PORT.
    """
    if rendezvous.startswith("/"):
        return dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]
    host, _, port = rendezvous.rpartition(":")
    fd = None if listening is None else os.dup(listening.fileno())  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), size, fd is not None, timeout, wait_for_workers=False, master_listen_fd=fd
    )


def arrive(store: Any, rank: int) -> None:
    """Say that this rank is about to join."""
    store.set(_arrival(rank), "")


def missing(store: Any, size: int) -> list[int]:
    """The ranks that have not arrived."""
    return [rank for rank in range(size) if not store.check([_arrival(rank)])]


def join_group(store: Any, rank: int, size: int, interface: str, timeout: timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Make the default process group, of gloo.

    Args:
        interface: what gloo talks over, unless GLOO_SOCKET_IFNAME names another.
        timeout: until all have joined.

    Raises: RuntimeError, they have not, or one has ended.
    """
    _world.group_count = 0  # a group has it in its name, which all ranks must know; torch counts failures, too
    with talking_over(interface):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    _set_pg_timeout(COLLECTIVE_TIMEOUT)


def talking_over(interface: str) -> contextlib.AbstractContextManager[None]:
    """Gloo and NCCL know it from the environment alone; an interface that is named there wins."""
    return environment(dict.fromkeys(INTERFACES, interface))


@contextlib.contextmanager
def environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """Variables for what reads nothing else; those that are set win. They are put back: the next group may have others."""
    ours = [name for name in defaults if not os.environ.get(name)]
    os.environ.update({name: defaults[name] for name in ours})
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def least(value: int) -> int:
    """The least of all ranks' values; of one rank, where there is no group. Every rank must ask in the same order.

    Raises: RuntimeError, a rank has ended.
    """
    if not dist.is_initialized():
        return value
    one = torch.tensor([value])
    dist.all_reduce(one, dist.ReduceOp.MIN)
    return int(one)


def gather_bytes(mine: bytes) -> list[bytes]:
    """Every rank's bytes, as many of each, in the order of ranks. Every rank must ask in the same order.

    Raises: RuntimeError, a rank has ended.
    """
    parts = [torch.empty(len(mine), dtype=torch.uint8) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.frombuffer(bytearray(mine), dtype=torch.uint8))
    return [bytes(part.tolist()) for part in parts]


def _arrival(rank: int) -> str:
    return f"rank {rank} has arrived"
