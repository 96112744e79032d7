"""HostPool is the host memory in which one rank keeps pages: a slot holds a page of all layers, in one piece."""

from __future__ import annotations

import logging
import mmap
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from nanoflow_backend.kvcache.kv_pages import KvPages

log = logging.getLogger(__name__)

SLICE_BYTES = 64 * 2**20  # that are pinned at once: 30 ms
PORTABLE_AND_MAPPED = 1 | 2  # of the runtime's flags: all contexts may copy it, and kernels read and write it


class HostPool:
    """Slots of `slot_bytes` each, a whole number of the host's pages, so that a slot can go to the disk as it is.

    On a CPU all slots are there at once. For a GPU their memory is pinned, slice by slice, on a thread of its own, and
    there are few at first. The host gives memory when it is first written, or pinned.

    Attributes:
        payload_bytes: of a slot, what a page takes: K and V of all layers, as [layers, 2, kv heads, page_tokens, d].
        num_slots: when all of them are there.
    """

    def __init__(self, kv: KvPages, num_slots: int) -> None:
        self.payload_bytes = kv.page_bytes
        self.slot_bytes = slot_bytes(kv.page_bytes)
        self.num_slots = num_slots
        self._memory = mmap.mmap(-1, max(1, num_slots) * self.slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)[: num_slots * self.slot_bytes]
        self.slots = self._bytes.view(num_slots, self.slot_bytes)
        self._ready = 0 if kv.tensor.is_cuda else num_slots
        self._closing = threading.Event()
        self._pinned: list[int] = []  # addresses
        weakref.finalize(self, _unpin, self._pinned).atexit = False
        self._thread = threading.Thread(target=self._pin, name="pin-host-pages", daemon=True)
        if kv.tensor.is_cuda:
            self._thread.start()

    @property
    def ready(self) -> int:
        """Slots that may be used: the first so many."""
        return self._ready

    def payload(self, slot: int) -> Tensor:
        """What a slot holds, uint8 [payload_bytes]."""
        return self.slots[slot, : self.payload_bytes]

    def view(self, slot: int) -> memoryview:
        """The same, for who reads and writes files."""
        begin = slot * self.slot_bytes
        return memoryview(self._memory)[begin : begin + self.payload_bytes]

    def close(self) -> None:
        """Give the memory back. Nothing may be on its way from it or to it."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        _unpin(self._pinned)
        self._ready = 0

    def _pin(self) -> None:
        runtime = _runtime()
        slots_a_slice = max(1, SLICE_BYTES // self.slot_bytes)
        for first in range(0, self.num_slots, slots_a_slice):
            if self._closing.is_set():
                return
            count = min(slots_a_slice, self.num_slots - first)
            address = self.slots[first].data_ptr()
            error = runtime.cudaHostRegister(address, count * self.slot_bytes, PORTABLE_AND_MAPPED)
            if error != runtime.cudaError.success:
                log.warning(
                    "host_kv_cache_bytes: %d of %d pages could be pinned, which is all there will be: %s",
                    first, self.num_slots, torch.cuda.CudaError(int(error)),
                )  # fmt: skip
                return
            self._pinned.append(address)
            self._ready = first + count


def _unpin(addresses: list[int]) -> None:
    while addresses:
        _runtime().cudaHostUnregister(addresses.pop())


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def slot_bytes(page_bytes: int) -> int:
    """What a slot takes for a page of so many bytes."""
    return -(-page_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
