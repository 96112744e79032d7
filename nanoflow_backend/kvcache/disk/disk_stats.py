"""DiskStats are what one rank's part of the disk tier has done, or that of all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Refusal(StrEnum):
    """Why a file is not read back."""

    SIZE = "size"  # cut short, or longer than it should be
    MAGIC = "magic"  # no page file
    VERSION = "version"  # of this format
    LAYOUT = "layout"  # of another model, precision, page size or rank
    CONTENT = "content"  # another page than its name says
    CHECKSUM = "checksum"  # some bit is not as it was written


class DiskStats(msgspec.Struct, frozen=True):
    """`pages` and the bytes in use are as they are now; the rest counts from the start."""

    pages: int = 0  # of this layout, known to this engine
    used_bytes: int = 0  # of all that share the folder
    max_bytes: int = 0
    read_pages: int = 0
    read_bytes: int = 0
    read_s: float = 0.0  # spent by all threads that read, failures included
    written_pages: int = 0
    written_bytes: int = 0
    write_s: float = 0.0
    evicted_pages: int = 0
    missing_files: int = 0  # others had removed what was to be read
    refused_files: dict[str, int] = {}  # by Refusal; each was removed
    failed: int = 0  # reads, writes and scans: the disk is full or broken, or another engine held the lock for too long

    @classmethod
    def of_ranks(cls, ranks: Sequence[DiskStats]) -> DiskStats:
        """Sums of what counts from the start; pages and bytes in use as rank 0 has them, first in the list."""
        now = ("pages", "used_bytes", "max_bytes", "refused_files")
        sums = {name: sum(getattr(rank, name) for rank in ranks) for name in cls.__struct_fields__ if name not in now}
        refused = sum((Counter(rank.refused_files) for rank in ranks), Counter[str]())
        return msgspec.structs.replace(ranks[0], refused_files=dict(refused), **sums)
