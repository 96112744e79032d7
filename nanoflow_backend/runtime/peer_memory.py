"""PeerMemory is memory of every rank's GPU that all ranks of a host have mapped, over CUDA's interprocess handles."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType, SimpleNamespace

import torch

from nanoflow_backend.runtime.green_contexts import call

GRAIN_BYTES = 2**21  # the driver's own: what is shared is whole pieces of memory, and nothing else may lie in them
LAZY_ENABLE_PEER_ACCESS = 1  # of the driver's flags: the other GPU's memory is reached without a copy


class PeerMemory:
    """An allocation of each rank, of zeros until the first rank uses it, and a word to end what waits for a rank.

    A handle names a whole allocation of the driver, so it is one: torch's allocator would give a part of one.

    Args:
        rank: this one; it has a context on its GPU.
        num_bytes: of each allocation, at least; the same on every rank.
        gather: every rank's bytes, as many of each, in the order of ranks. Called twice.

    Attributes:
        abort: [1] int32, in pinned host memory, which a kernel that waits for a rank reads; not 0: wait no longer.

    Raises:
        RuntimeError: the memory of a rank, which is named, cannot be mapped; or a rank has ended.
    """

    def __init__(
        self,
        rank: int,
        num_bytes: int,
        gather: Callable[[bytes], list[bytes]],
        driver: ModuleType | SimpleNamespace | None = None,
    ) -> None:
        self._driver = driver = driver or import_module("cuda.bindings.driver")  # it is there where a GPU is
        self._rank = rank
        self.abort = torch.zeros(1, dtype=torch.int32, pin_memory=torch.cuda.is_available())
        size = -(-num_bytes // GRAIN_BYTES) * GRAIN_BYTES
        own = call(driver.cuMemAlloc, size)
        self._at = {rank: int(own)}
        try:
            call(driver.cuMemsetD8, own, 0, size)
            call(driver.cuCtxSynchronize)  # before anybody knows of it
            for peer, handle in enumerate(gather(call(driver.cuIpcGetMemHandle, own).reserved)):
                if peer != rank:
                    self._at[peer] = self._map(peer, handle)
            gather(b"mapped")  # all have: a rank may write to the others now
        except RuntimeError:
            self.close()
            raise

    @property
    def addresses(self) -> list[int]:
        """Of each rank's allocation, in this process."""
        return [address for _, address in sorted(self._at.items())]

    def close(self) -> None:
        """Give the memory back, when no kernel uses it, here or on a rank that lives. Harmless when repeated."""
        while self._at:
            rank, address = self._at.popitem()
            free = self._driver.cuMemFree if rank == self._rank else self._driver.cuIpcCloseMemHandle
            free(address)  # whatever comes of it: where a rank has died, the driver may have lost its memory

    def _map(self, rank: int, handle: bytes) -> int:
        named = self._driver.CUipcMemHandle()
        named.reserved = handle
        try:
            return int(call(self._driver.cuIpcOpenMemHandle, named, LAZY_ENABLE_PEER_ACCESS))
        except RuntimeError as error:
            raise RuntimeError(
                f'collectives: rank {self._rank} cannot map the memory of rank {rank} ({error}): try "nccl"'
            ) from None
