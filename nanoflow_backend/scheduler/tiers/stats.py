"""TierStats are what the tiers below the device have done."""

from __future__ import annotations

import msgspec


class TierStats(msgspec.Struct, frozen=True):
    """Pages of host memory as they are now; the rest counts from the start. By move: store, load, write, read."""

    host_pages: int  # that there is memory for by now
    host_used_pages: int
    evicted_pages: int  # of host memory, for other content
    dropped_pages: int  # that were to be stored or written, and left before their turn, or found no room
    page_bytes: int  # on all ranks
    moved_pages: dict[str, int]  # by move
    failed_pages: dict[str, int]  # by move, write and read: what was not kept, not found, or not whole
    busy_s: dict[str, float]  # by move, that the link or the disk took

    @property
    def moved_bytes(self) -> dict[str, int]:
        """By move."""
        return {move: pages * self.page_bytes for move, pages in self.moved_pages.items()}
