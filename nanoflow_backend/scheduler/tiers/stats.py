"""TierStats are what the tiers below the device have done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import msgspec

from nanoflow_backend.kvcache.disk.disk_stats import DiskStats
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.tier import Move
from nanoflow_backend.scheduler.tiers.transfers import Transfers

Drop = Literal[
    "left_device",  # it was needed for other content before the page's turn: stores are slower than what fills pages
    "no_predecessor",  # what comes before it is in no tier below, so it could not be found
    "no_slot",  # all that is in host memory was in use
    "left_host",  # it was evicted before it was written to the disk: writes are slower than stores
    "closed",  # the engine ended first
]
DROPS: tuple[Drop, ...] = get_args(Drop)


class TierStats(msgspec.Struct, frozen=True):
    """Pages of host memory as they are now; the rest counts from the start. By move: store, load, write, read."""

    host_pages: int  # that there is memory for by now
    host_used_pages: int
    evicted_pages: int  # of host memory, for other content
    dropped_pages: dict[Drop, int]  # that were to be stored or written, and were not
    page_bytes: int  # on all ranks
    moved_pages: dict[str, int]  # by move
    failed_pages: dict[str, int]  # by move, write and read: what was not kept, not found, or not whole
    busy_s: dict[str, float]  # by move, that the link or the disk took
    disk: DiskStats | None = None  # where there is one

    @classmethod
    def of(
        cls, host: HostTier, transfers: Transfers, dropped: Mapping[Drop, int], page_bytes: int, disk: DiskStats | None
    ) -> TierStats:
        """As they are now."""
        moved, failed, busy_s = transfers.moved, transfers.failed, transfers.busy_s
        return cls(
            host_pages=host.num_slots,
            host_used_pages=len(host),
            evicted_pages=host.evicted,
            dropped_pages=dict(dropped),
            page_bytes=page_bytes,
            moved_pages={move.name.lower(): moved[move] for move in Move},
            failed_pages={move.name.lower(): failed[move] for move in (Move.WRITE, Move.READ)},
            busy_s={move.name.lower(): busy_s[move] for move in Move},
            disk=disk,
        )

    @property
    def moved_bytes(self) -> dict[str, int]:
        """By move."""
        return {move: pages * self.page_bytes for move, pages in self.moved_pages.items()}
