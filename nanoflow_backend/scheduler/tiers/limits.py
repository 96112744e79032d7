"""TierLimits bound what the tiers below the device take from the link and the disk at a time."""

from __future__ import annotations

from dataclasses import dataclass

from nanoflow_backend.scheduler.tiers.store_queue import Keep


@dataclass(frozen=True, kw_only=True)
class TierLimits:
    """Pages, each of all layers, and on all ranks.

    Raises:
        ValueError: a limit below one, which it names.
    """

    store_pages: int  # that a step may begin to copy to host memory
    load_pages: int  # that may be on their way to the device at once
    disk_moves: int = 16  # pages on their way to the disk at once, and as many from there
    keep: Keep = "all"  # what is worth keeping, see StoreQueue
    most_seen: int = 2**20  # contents that "seen_twice" remembers, 100 bytes each
    page_bytes: int = 0  # for statistics; 0: nobody says

    def __post_init__(self) -> None:
        for name in ("store_pages", "load_pages", "disk_moves", "most_seen"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
