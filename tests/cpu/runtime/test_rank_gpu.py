"""Each rank's GPU and the CPU cores near it. No GPU is needed: what driver and kernel would say is said here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.runtime import rank_gpu
from nanoflow_backend.runtime.rank_gpu import check_gpus, stay_near_gpu, take_gpu

CONFIG = EngineConfig(model="m", tensor_parallel=4)
TWO_HOSTS = replace(CONFIG, hosts=2, secret_file="s")
VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,5,6,7")
    monkeypatch.delenv(rank_gpu.SHARED, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: os.environ[VISIBLE].count(",") + 1)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: True)


@pytest.mark.parametrize(("rank", "expected"), [(0, "4,5,6,7"), (1, "5,4,6,7"), (2, "6,4,5,7"), (3, "7,4,5,6")])
def test_a_ranks_own_gpu_comes_first_and_the_others_stay_visible(rank: int, expected: str) -> None:
    take_gpu(CONFIG, rank)
    assert os.environ[VISIBLE] == expected


def test_where_the_environment_names_no_gpus_they_have_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    take_gpu(CONFIG, 2)
    assert os.environ[VISIBLE] == "2,0,1"


@pytest.mark.parametrize(("rank", "gpus", "expected"), [(1, None, "5,4,6,7"), (3, None, "5,4,6,7"), (3, (2, 0), "4,6")])
def test_ranks_of_another_host_take_its_gpus(rank: int, gpus: tuple[int, ...] | None, expected: str) -> None:
    """Of GPUs that are named, the leader has shown its own to its ranks; a rank of another host shows them itself."""
    take_gpu(replace(TWO_HOSTS, gpus=gpus), rank)
    assert os.environ[VISIBLE] == expected


def test_fewer_gpus_than_ranks_are_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,5,6")
    with pytest.raises(ConfigError, match=r"host has 3 for 4 \(tensor_parallel 4; CUDA_VISIBLE_DEVICES is 4,5,6\)"):
        check_gpus(CONFIG)
    assert check_gpus(TWO_HOSTS) == "nccl"
    monkeypatch.setenv(VISIBLE, "4")
    with pytest.raises(ConfigError, match=r"this host has 1 for 2 \(tensor_parallel 4 / hosts 2"):
        take_gpu(TWO_HOSTS, 3)
    monkeypatch.delenv(VISIBLE)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"this host has 0 for 4 \(tensor_parallel 4; all are visible\)"):
        check_gpus(CONFIG)


def test_ranks_exchange_rows_by_what_every_pair_of_gpus_can(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_gpus(CONFIG) == check_gpus(replace(CONFIG, collectives="peer")) == "peer"
    assert check_gpus(replace(CONFIG, collectives="nccl")) == "nccl"
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: (one, other) != (3, 1))
    assert check_gpus(CONFIG) == "nccl"
    with pytest.raises(ConfigError, match="for GPU 3 cannot map the memory of GPU 1, got peer"):
        check_gpus(replace(CONFIG, collectives="peer"))


def test_tests_may_put_all_ranks_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4")
    monkeypatch.setenv(rank_gpu.SHARED, "1")
    assert check_gpus(CONFIG) == "peer"
    take_gpu(CONFIG, 3)
    assert os.environ[VISIBLE] == "4"


def kernel_files(folder: Path, node: str | None, cores: str) -> Path:
    device, of_node = folder / "bus/pci/devices/0000:1b:00.0", folder / "devices/system/node/node1"
    device.mkdir(parents=True)
    of_node.mkdir(parents=True)
    if node is not None:
        (device / "numa_node").write_text(f"{node}\n")
    (of_node / "cpulist").write_text(f"{cores}\n")
    return folder


@pytest.mark.parametrize(
    ("node", "cores", "expected", "said"),
    [
        ("1", "2-4,9", {2, 4}, "pinned to 2 CPU cores of NUMA node 1"),
        ("1", "5-7", None, "not pinned: none of its 3 CPU cores is ours"),
        ("-1", "2-4", None, "not pinned: the kernel names no NUMA node"),
        (None, "2-4", None, "not pinned: the kernel names no NUMA node"),
    ],
)
def test_a_rank_stays_on_those_of_its_cores_that_are_near_its_gpu(
    node: str | None,
    cores: str,
    expected: set[int] | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pinned: list[set[int]] = []
    monkeypatch.setattr(rank_gpu, "pci_address", lambda: "0000:1b:00.0")
    monkeypatch.setattr(os, "sched_getaffinity", lambda thread: {0, 2, 4})
    monkeypatch.setattr(os, "sched_setaffinity", lambda thread, allowed: pinned.append(allowed))
    with caplog.at_level("INFO"):
        stay_near_gpu(3, kernel_files(tmp_path, node, cores))
    assert pinned == ([] if expected is None else [expected])
    assert [record.message for record in caplog.records] == [f"rank 3: its GPU is 0000:1b:00.0; {said}"]
