"""What copying pages must do, the same in the interpreter, on a CPU and on a device."""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor

from nanoflow_backend.kvcache.host_pool import HostPool
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.page_copies import PageCopies, PageCopy

SHAPES = {  # layers, pages, K and V, heads, tokens, d
    "pages of a multiple of eight bytes": (3, 11, 2, 2, 4, 6),
    "odd pages": (2, 7, 2, 1, 1, 3),
    "pages larger than a block": (2, 5, 2, 8, 64, 64),
}


def random_pages(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> KvPages:
    """Of any bits, NaNs too."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    bits = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
    return KvPages(bits.view(dtype).view(shape).to(device))


def bits_of(kv: KvPages) -> Tensor:
    """uint8 [layers, pages, bytes of a page in a layer], on the host."""
    return kv.tensor.cpu().clone().view(torch.uint8).flatten(2)


def check_round_trip(copies: PageCopies, kv: KvPages, pool: HostPool, seed: int = 0) -> None:
    """Pages go to slots, and come back into other pages; nothing else changes, bit by bit."""
    rng, before = random.Random(seed), bits_of(kv)
    pages = rng.sample(range(kv.num_pages), kv.num_pages // 2)
    slots = rng.sample(range(pool.num_slots), len(pages))
    pool.slots.fill_(0)
    wait(copies.begin(pages, slots, to_host=True))
    assert torch.equal(bits_of(kv), before), "pages change by being read"
    for page, slot in zip(pages, slots, strict=True):
        assert torch.equal(pool.payload(slot), before[:, page].reshape(-1)), "one piece, layer by layer"
        assert bytes(pool.view(slot)) == before[:, page].numpy().tobytes()
        assert not pool.slots[slot, pool.payload_bytes :].any()
    untouched = set(range(pool.num_slots)) - set(slots)
    assert not pool.slots[sorted(untouched)].any()
    targets = rng.sample(range(kv.num_pages), len(pages))
    wait(copies.begin(targets, slots, to_host=False))
    expected = before.clone()
    expected[:, targets] = before[:, pages]
    assert torch.equal(bits_of(kv), expected)


def wait(copy: PageCopy) -> float:
    """The seconds that it took."""
    deadline_s = time.monotonic() + 10
    while (seconds := copy.seconds()) is None:
        assert time.monotonic() < deadline_s, "a copy does not end"
        time.sleep(1e-3)
    assert seconds > 0
    return seconds
