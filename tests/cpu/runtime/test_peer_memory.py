"""PeerMemory beside a driver that is arithmetic: ranks are threads, and each has addresses of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest

from nanoflow_backend.runtime.peer_memory import GRAIN_BYTES, PeerMemory


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_MAP_FAILED = 205


class Driver(SimpleNamespace):
    """What one process sees: its allocation at 1000 * (rank + 1), that of rank r at 1000 * (rank + 1) + r + 1."""

    class CUipcMemHandle:
        reserved = b""

    def __init__(self, rank: int, unmappable: int | None = None) -> None:
        self.rank, self.unmappable = rank, unmappable
        self.calls: list[tuple[Any, ...]] = []

    def cuMemAlloc(self, size: int) -> tuple[Result, int]:
        self.calls.append(("alloc", size))
        return Result.CUDA_SUCCESS, 1000 * (self.rank + 1)

    def cuMemsetD8(self, address: int, value: int, size: int) -> tuple[Result]:
        self.calls.append(("set", address, value, size))
        return (Result.CUDA_SUCCESS,)

    def cuCtxSynchronize(self) -> tuple[Result]:
        self.calls.append(("wait",))
        return (Result.CUDA_SUCCESS,)

    def cuIpcGetMemHandle(self, address: int) -> tuple[Result, SimpleNamespace]:
        assert address == 1000 * (self.rank + 1)
        return Result.CUDA_SUCCESS, SimpleNamespace(reserved=bytes([self.rank]) * 64)

    def cuIpcOpenMemHandle(self, handle: Any, flags: int) -> tuple[Result, int]:
        peer = handle.reserved[0]
        assert peer != self.rank, "a process cannot open its own"
        assert (len(handle.reserved), flags) == (64, 1)
        if peer == self.unmappable:
            return Result.CUDA_ERROR_MAP_FAILED, 0
        return Result.CUDA_SUCCESS, 1000 * (self.rank + 1) + peer + 1

    def cuMemFree(self, address: int) -> tuple[Result]:
        self.calls.append(("free", address))
        return (Result.CUDA_SUCCESS,)

    def cuIpcCloseMemHandle(self, address: int) -> tuple[Result]:
        self.calls.append(("unmap", address))
        return (Result.CUDA_SUCCESS,)


def gathering(ranks: int) -> Callable[[int], Callable[[bytes], list[bytes]]]:
    """By rank, what gathers bytes of all ranks; each call is a meeting."""
    barrier, given = threading.Barrier(ranks, timeout=10), [b""] * ranks

    def of(rank: int) -> Callable[[bytes], list[bytes]]:
        def gather(mine: bytes) -> list[bytes]:
            given[rank] = mine
            barrier.wait()
            all_of_them = list(given)
            barrier.wait()
            return all_of_them

        return gather

    return of


@pytest.mark.parametrize("ranks", [2, 5])
def test_every_rank_maps_all_others_and_gives_all_back(ranks: int) -> None:
    drivers, gather = [Driver(rank) for rank in range(ranks)], gathering(ranks)

    def opened(rank: int) -> PeerMemory:
        return PeerMemory(rank, GRAIN_BYTES + 1, gather(rank), drivers[rank])  # type: ignore[arg-type]

    with ThreadPoolExecutor(ranks) as pool:
        memories = list(pool.map(opened, range(ranks)))
    for rank, memory in enumerate(memories):
        base = 1000 * (rank + 1)
        assert memory.addresses == [base if peer == rank else base + peer + 1 for peer in range(ranks)]
        assert drivers[rank].calls == [("alloc", 2 * GRAIN_BYTES), ("set", base, 0, 2 * GRAIN_BYTES), ("wait",)]
        assert memory.abort.tolist() == [0]
        memory.close()
        memory.close()
        freed = sorted(drivers[rank].calls[3:])
        assert freed == [("free", base), *(("unmap", base + peer + 1) for peer in range(ranks) if peer != rank)]


def test_memory_that_cannot_be_mapped_names_both_ranks_and_is_given_back() -> None:
    driver = Driver(0, unmappable=1)
    expected = r'rank 0 cannot map the memory of rank 1 \(cuIpcOpenMemHandle: CUDA_ERROR_MAP_FAILED\): try "nccl"'
    with pytest.raises(RuntimeError, match=expected):
        PeerMemory(0, 1, lambda mine: [mine, bytes([1]) * 64], driver)  # type: ignore[arg-type]
    assert driver.calls[3:] == [("free", 1000)]
