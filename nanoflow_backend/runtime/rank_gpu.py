"""This module gives each rank of a host its GPU, and the CPU cores that are nearest to it."""

from __future__ import annotations

import logging
import os
from importlib import import_module
from itertools import permutations
from pathlib import Path
from typing import Literal

import torch

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.runtime.device import VISIBLE, show_first, show_only
from nanoflow_backend.runtime.green_contexts import call

# For tests on a machine with one GPU: all ranks of a host have the first. They are time-sliced, and need `peer`.
SHARED = "NANOFLOW_TEST_SHARED_GPU"
SYS = Path("/sys")
ADDRESS_BYTES = 16  # of a PCI address, and the byte that ends it

log = logging.getLogger(__name__)


def check_gpus(config: EngineConfig) -> Literal["nccl", "peer"]:
    """What the ranks of this host exchange rows with: as configured, or by what its GPUs can.

    Raises:
        ConfigError: there are fewer GPUs than ranks, or two of them cannot map each other's memory as configured.
    """
    ranks = config.tensor_parallel // config.hosts
    if os.environ.get(SHARED):
        return "peer"
    count = torch.cuda.device_count()
    if count < ranks:
        which = f"{VISIBLE} is {os.environ[VISIBLE]}" if os.environ.get(VISIBLE) else "all are visible"
        each = "" if config.hosts == 1 else f" / hosts {config.hosts}"
        raise ConfigError(
            f"tensor_parallel: expected as many GPUs as ranks, but this host has {count} for {ranks} "
            f"(tensor_parallel {config.tensor_parallel}{each}; {which})"
        )
    if config.hosts > 1 or config.collectives == "nccl":
        return "nccl"
    apart = [pair for pair in permutations(range(ranks), 2) if not torch.cuda.can_device_access_peer(*pair)]
    if not apart:
        return "peer"
    if config.collectives == "peer":
        one, other = apart[0]
        raise ConfigError(
            f"collectives: expected auto or nccl, for GPU {one} cannot map the memory of GPU {other}, got peer"
        )
    log.info("collectives: nccl, for GPU %d cannot map the memory of GPU %d", *apart[0])
    return "nccl"


def take_gpu(config: EngineConfig, rank: int) -> None:
    """Make a rank's GPU the first of its process, which must not have used one yet: the others stay visible.

    Raises: ConfigError, see check_gpus; or this host does not have `config.gpus`.
    """
    host, number = divmod(rank, config.tensor_parallel // config.hosts)
    if host and config.gpus is not None:  # the leader's own ranks inherit what it has shown itself
        show_only(config.gpus)
    if host:
        check_gpus(config)
    show_first(0 if os.environ.get(SHARED) else number)


def stay_near_gpu(rank: int, sys: Path = SYS) -> None:
    """Keep this thread, and those that it starts, on the CPU cores of its GPU's NUMA node; the log says where.

    Without a node, as in most virtual machines, it stays where it is.
    """
    address = pci_address()
    node = _read(sys / "bus/pci/devices" / address / "numa_node")
    cores = _parse(_read(sys / "devices/system/node" / f"node{node}" / "cpulist") or "")
    allowed = cores & os.sched_getaffinity(0)
    if not allowed:
        why = f"none of its {len(cores)} CPU cores is ours" if cores else "the kernel names no NUMA node"
        log.info("rank %d: its GPU is %s; not pinned: %s", rank, address, why)
        return
    os.sched_setaffinity(0, allowed)
    log.info("rank %d: its GPU is %s; pinned to %d CPU cores of NUMA node %s", rank, address, len(allowed), node)


def pci_address() -> str:
    """Of the current device, as the kernel writes it: 0000:1b:00.0."""
    driver = import_module("cuda.bindings.driver")  # it is there where a GPU is
    torch.cuda.init()
    device = call(driver.cuDeviceGet, torch.cuda.current_device())
    address: bytes = call(driver.cuDeviceGetPCIBusId, ADDRESS_BYTES, device)
    return address.split(b"\0")[0].decode().lower()


def _read(file: Path) -> str | None:
    """A line of the kernel. A GPU without a node says -1, of which there is no folder."""
    try:
        return file.read_text().strip()
    except OSError:
        return None


def _parse(cores: str) -> set[int]:
    """CPU cores as the kernel lists them: "0-3,8"."""
    ends = [part.split("-") for part in cores.split(",") if part]
    return {core for first, *last in ends for core in range(int(first), int((last or [first])[0]) + 1)}
