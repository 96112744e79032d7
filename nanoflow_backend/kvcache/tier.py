"""The words that the tiers of the KV cache share: a Tier finds content, a Transfer moves it, a PageStore outlives us.

    device   pages that requests compute on                 DeviceTier: who holds which page
       |     STORE, LOAD                                                                         (ints: the scheduler)
    host     slots, a page of all layers each, contiguous   HostTier: which slot holds which content
       |     WRITE, READ
    disk     a file for each page                           PageStore: finds, keeps and returns payloads (each rank)

Content is named by its hash (content_hash). The scheduler decides which pages move, in ints; every rank moves its own
part of them beside its kernels, and reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol

import msgspec

from nanoflow_backend.kvcache.content_hash import HASH_BYTES
from nanoflow_backend.kvcache.disk.disk_stats import DiskStats

FIRST = bytes(HASH_BYTES)  # stands for the page before the first one


class Move(IntEnum):
    """From where to where a page goes."""

    STORE = 0  # from the device's page to the slot of host memory
    LOAD = 1  # from the slot to the device's page
    WRITE = 2  # from the slot to the disk
    READ = 3  # from the disk to the slot


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """One page to be moved. It begins after the steps that had come back when its batch was formed, and may end
    whenever it likes: until it is reported, nobody else touches the page or the slot."""

    id: int  # counts all transfers
    move: Move
    slot: int
    page: int = -1  # of the device, for STORE and LOAD
    content: bytes = b""  # its name on the disk, for WRITE and READ
    parent: bytes = FIRST  # content of the page before it, for WRITE


class TransferReport(msgspec.Struct, frozen=True, array_like=True):
    """What has come of transfers since the last report. Of several ranks: of all of them."""

    done: list[int] = []  # ids
    failed: list[int] = []  # a READ of what is not there, or is not whole; a WRITE that was not kept
    slots: int = 0  # of host memory that are there by now: slots 0 .. slots - 1
    seconds: tuple[float, ...] = (0.0,) * len(Move)  # by move, that the link or the disk was busy with what is done
    found: list[bytes] = []  # contents that the disk of a rank other than 0 has from now on
    gone: list[bytes] = []  # and that it no longer has
    disk: DiskStats | None = None  # of such a rank, where some of its transfers have ended


class Tier(Protocol):
    """Where pages lie that others can find by their content, in ints."""

    def lookup(self, content: bytes) -> int | None:
        """The page or slot that holds this content, whole; None if there is none."""
        ...

    def check(self) -> None:
        """Raise AssertionError if content is lost, or in two places."""
        ...


class PageIndex(Protocol):
    """What is known of a PageStore, or of those of all ranks. The scheduler may ask in any step: it answers at once."""

    def lookup(self, content: bytes) -> bool:
        """Whether `read` would probably find it, on every rank."""
        ...

    @property
    def stats(self) -> DiskStats:
        """What has come of reads and writes up to now."""
        ...


class PageStore(PageIndex, Protocol):
    """Keeps one rank's payloads of pages by their content, beyond the life of this process.

    `write` and `read` take their time, and are called by other threads, several of them at once. A payload has the same
    length in all calls. Whatever else its place is shared with, or whatever happens to the process: what `read` returns
    is what `write` was given.
    """

    def write(self, content: bytes, payload: memoryview, parent: bytes = FIRST) -> bool:
        """Keep a payload, whose page follows that of `parent`; others may have to go for it. False: it was not kept, as
        on a full disk."""
        ...

    def read(self, content: bytes, payload: memoryview) -> bool:
        """Fill the payload. False: it is not there, or not whole; `payload` then holds anything."""
        ...

    def close(self) -> None:
        """Nothing is called afterwards."""
        ...


def leading_slots(tier: Tier, contents: Iterable[bytes]) -> list[int]:
    """Where the leading contents lie, up to the first that the tier does not have."""
    slots = []
    for content in contents:
        slot = tier.lookup(content)
        if slot is None:
            break
        slots.append(slot)
    return slots
