"""LossyDisk: a disk of ledger pages on which pages get lost, of a bounded number of them."""

from __future__ import annotations

import random

from nanoflow_backend.kvcache.disk.disk_stats import DiskStats


class LossyDisk:
    """A PageIndex (see there), and what LedgerExecutor does to it.

    Args:
        capacity: pages; others go for new ones.
        rng: decides what is lost: pages that are not kept, and pages that cannot be read again. None: nothing is.
    """

    def __init__(self, capacity: int, rng: random.Random | None = None) -> None:
        self._capacity, self._rng = capacity, rng
        self._pages: dict[bytes, list[int]] = {}

    @property
    def stats(self) -> DiskStats:
        return DiskStats(pages=len(self._pages))

    def lookup(self, content: bytes) -> bool:
        return content in self._pages

    def write(self, content: bytes, page: list[int]) -> bool:
        if not self._capacity or (self._rng and self._rng.random() < 0.1):
            return False
        while len(self._pages) >= self._capacity:
            del self._pages[next(iter(self._pages))]
        self._pages[content] = page
        return True

    def read(self, content: bytes) -> list[int] | None:
        if self._rng and self._rng.random() < 0.3:
            self._pages.pop(content, None)
        return self._pages.get(content)
