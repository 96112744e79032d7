"""Copies of pages between the device and host memory: CpuPageCopies makes them at once, CudaPageCopies beside kernels.

P pages of the device, L layers, C pages that are copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from nanoflow_backend.kvcache.host_pool import HostPool
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.green_contexts import call
from nanoflow_backend.runtime.transfer import to_device

How = Literal["kernel", "batched"]
# With which a kernel keeps the link busy, measured on an H200. No plan leaves them out of its shares: 2 of 132 SMs are
# 1.5 % of what products can do, all the time, for copies that are on the way 7 % of it (Llama-3-8B at 28,000 tokens/s).
TO_HOST_SMS, FROM_HOST_SMS = 2, 8
PAGES_A_LAUNCH = 8  # a longer kernel would hold up those that want all SMs


class PageCopy(Protocol):
    """Copies that were begun together."""

    def seconds(self) -> float | None:
        """What they took; None: they have not ended yet."""
        ...


class PageCopies(Protocol):
    """Copies pages of all layers. Those of one direction end in the order in which they began."""

    def begin(
        self, pages: Sequence[int], slots: Sequence[int], *, to_host: bool, after: torch.cuda.Event | None = None
    ) -> PageCopy:
        """Copy pages to slots, or, unless `to_host`, slots to pages, when `after` has come."""
        ...


class Ended(float):
    """A PageCopy that took so many seconds."""

    def seconds(self) -> float:
        """See PageCopy."""
        return float(self)


class CpuPageCopies:
    """PageCopies (see there) that are made when they begin."""

    def __init__(self, kv: KvPages, pool: HostPool) -> None:
        self._pages, self._pool = _as_bytes(kv), pool

    def begin(
        self, pages: Sequence[int], slots: Sequence[int], *, to_host: bool, after: torch.cuda.Event | None = None
    ) -> Ended:
        """See PageCopies."""
        start_s = time.perf_counter()
        for page, slot in zip(pages, slots, strict=True):
            on_device = self._pages[:, page]
            on_host = self._pool.payload(slot).view(on_device.shape)
            (on_host if to_host else on_device).copy_(on_device if to_host else on_host)
        return Ended(time.perf_counter() - start_s)


class CudaPageCopy:
    """A PageCopy between two events of a stream."""

    def __init__(self, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._start, self._end = start, end

    def seconds(self) -> float | None:
        """See PageCopy."""
        return self._start.elapsed_time(self._end) / 1e3 if self._end.query() else None


class CudaPageCopies:
    """PageCopies (see there) on two streams of their own, one for each direction.

    Args:
        how: "kernel": one that reads or writes host memory itself, on few SMs, a launch for every few pages; or
            "batched": the copy engines, told of all pieces of all pages in one call.
        pages_a_launch: of the kernel.
    """

    def __init__(self, kv: KvPages, pool: HostPool, how: How = "kernel", pages_a_launch: int = PAGES_A_LAUNCH) -> None:
        self._pages, self._pool = kv.tensor, pool
        self._streams = {to_host: torch.cuda.Stream() for to_host in (True, False)}
        self._words = as_words(kv.tensor, pool.slots)
        self._how, self._pages_a_launch = how, pages_a_launch
        if how == "kernel":
            self._compile()

    def begin(
        self, pages: Sequence[int], slots: Sequence[int], *, to_host: bool, after: torch.cuda.Event | None = None
    ) -> CudaPageCopy:
        """See PageCopies."""
        stream = self._streams[to_host]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            start.record()
            if self._how == "kernel":
                self._by_kernel(pages, slots, to_host)
            else:
                self._by_copy_engines(pages, slots, to_host)
            end.record()
        return CudaPageCopy(start, end)

    def _by_kernel(self, pages: Sequence[int], slots: Sequence[int], to_host: bool) -> None:
        copy_pages = _kernel()
        on_device, on_host = self._words
        ids = to_device(np.array([pages, slots], np.int32), self._pages.device)
        for first in range(0, len(pages), self._pages_a_launch):
            page_ids, slot_ids = ids[:, first : first + self._pages_a_launch]
            sms = TO_HOST_SMS if to_host else FROM_HOST_SMS
            copy_pages(on_device, on_host, page_ids, slot_ids, to_host=to_host, programs=sms)

    def _compile(self) -> None:
        """Compile the kernel now, that no step has to wait for it: page 0 goes to a slot of its own, and comes back."""
        on_device, on_host = self._words
        slot = torch.empty((1, on_host.shape[1]), dtype=on_host.dtype, pin_memory=True)
        first = torch.zeros(1, dtype=torch.int32, device=self._pages.device)
        for to_host in (True, False):
            _kernel()(on_device, slot, first, first, to_host=to_host, programs=TO_HOST_SMS)
        torch.cuda.current_stream().synchronize()

    def _by_copy_engines(self, pages: Sequence[int], slots: Sequence[int], to_host: bool) -> None:
        driver = import_module("cuda.bindings.driver")  # it is there where a GPU is
        piece_bytes = self._pages[0, 0].numel() * self._pages.element_size()
        layers = np.arange(len(self._pages), dtype=np.int64)
        layer_bytes = self._pages.stride(0) * self._pages.element_size()
        at_pages = self._pages.data_ptr() + np.add.outer(np.array(pages, np.int64) * piece_bytes, layers * layer_bytes)
        first_slot, slot_bytes = self._pool.slots.data_ptr(), self._pool.slot_bytes
        at_slots = first_slot + np.add.outer(np.array(slots, np.int64) * slot_bytes, layers * piece_bytes)
        sources, targets = (at_pages, at_slots) if to_host else (at_slots, at_pages)
        attributes = driver.CUmemcpyAttributes()
        attributes.srcAccessOrder = driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        pieces = [driver.CUdeviceptr(at) for at in targets.ravel().tolist()]
        from_pieces = [driver.CUdeviceptr(at) for at in sources.ravel().tolist()]
        sizes, stream = [piece_bytes] * len(pieces), self._streams[to_host].cuda_stream
        call(driver.cuMemcpyBatchAsync, pieces, from_pieces, sizes, len(pieces), [attributes], [0], 1, stream)


def _kernel() -> Callable[..., None]:
    """Its language is there where a GPU is."""
    copy_pages: Callable[..., None] = import_module("nanoflow_kernels.copy_pages").copy_pages
    return copy_pages


def as_words(pages: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """The same memory in the widest words that both divide into: pages [L, P, words of a page in a layer], slots [S,
    words of a slot]; see copy_pages.

    Args:
        pages: [L, P, ...], contiguous, of any dtype.
        slots: [S, bytes], uint8, contiguous.
    """
    in_bytes = pages.view(torch.uint8).flatten(2)
    if in_bytes.shape[2] % 8:
        return in_bytes, slots
    return in_bytes.view(torch.int64), slots.view(torch.int64)


def _as_bytes(kv: KvPages) -> Tensor:
    """[L, P, bytes of a page in a layer]."""
    return kv.tensor.view(torch.uint8).flatten(2)
