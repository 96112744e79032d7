"""Copies between pages and host memory on a CPU, and the memory itself. On a GPU: tests/gpu/test_page_copies.py."""

from __future__ import annotations

import mmap

import pytest
import torch
from support.kernels.page_copies import SHAPES, check_round_trip, random_pages

from nanoflow_backend.kvcache.host_pool import HostPool, slot_bytes
from nanoflow_backend.runtime.page_copies import CpuPageCopies


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_pages_come_back_bit_by_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    kv = random_pages(shape, dtype, "cpu")
    pool = HostPool(kv, 9)
    check_round_trip(CpuPageCopies(kv, pool), kv, pool)


def test_slots_are_whole_pages_of_the_host_and_there_at_once() -> None:
    kv = random_pages((3, 11, 2, 2, 4, 6), torch.float32, "cpu")
    pool = HostPool(kv, 5)
    assert (pool.payload_bytes, pool.slot_bytes, pool.ready) == (kv.page_bytes, slot_bytes(kv.page_bytes), 5)
    assert pool.slot_bytes % mmap.PAGESIZE == 0
    assert pool.slots.data_ptr() % mmap.PAGESIZE == 0
    pool.close()
    assert pool.ready == 0
