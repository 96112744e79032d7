"""RankReports joins what the ranks say of their transfers and disks: a page has moved, or is there, when every rank's
part of it has or is."""

from __future__ import annotations

import threading
from collections import Counter

from nanoflow_backend.kvcache.disk.disk_stats import DiskStats
from nanoflow_backend.kvcache.tier import PageIndex, TransferReport


class RankReports:
    """Any thread may `add`; one calls `join`."""

    def __init__(self, ranks: int) -> None:
        """`ranks` of the group, rank 0 included."""
        self._ranks = ranks
        self._lock = threading.Lock()
        self._came: list[TransferReport] = []  # of other ranks, since the last join
        self._slots = dict.fromkeys(range(1, ranks), 0)
        self._on_disk: dict[int, set[bytes]] = {rank: set() for rank in range(1, ranks)}
        self._disk_stats: dict[int, DiskStats] = {}
        self._ended: Counter[int] = Counter()  # ranks that are done with a transfer, by its id
        self._failed: set[int] = set()  # on some rank, while it goes on on others

    def add(self, rank: int, report: TransferReport) -> None:
        """What a rank other than 0 says."""
        with self._lock:
            self._came.append(report)
            self._slots[rank] = max(self._slots[rank], report.slots)
            self._on_disk[rank].update(report.found)
            self._on_disk[rank].difference_update(report.gone)
            if report.disk is not None:
                self._disk_stats[rank] = report.disk

    def join(self, report: TransferReport) -> TransferReport:
        """What has ended on all ranks by now; `report` is that of rank 0. A transfer that failed on one has failed."""
        with self._lock:
            came, self._came = self._came, []
            slots = min(report.slots, *self._slots.values())
        for each in (report, *came):
            self._ended.update(each.done)
            self._ended.update(each.failed)
            self._failed.update(each.failed)
        everywhere = [id for id, ranks in self._ended.items() if ranks == self._ranks]
        failed = [id for id in everywhere if id in self._failed]
        done = [id for id in everywhere if id not in self._failed]
        self._failed.difference_update(failed)
        for id in everywhere:
            del self._ended[id]
        return TransferReport(done, failed, slots, report.seconds)

    def index(self, own: PageIndex) -> PageIndex:
        """Of all ranks' disks, `own` being that of rank 0."""
        return _OfAllRanks(own, self._on_disk, self._disk_stats)


class _OfAllRanks:
    """A PageIndex, see there: a page is there if every rank has its part, for no other can be loaded.

    So a page that one rank has lost is computed, and written again by that rank.
    """

    def __init__(self, own: PageIndex, on_disk: dict[int, set[bytes]], stats: dict[int, DiskStats]) -> None:
        self._own, self._others, self._stats_of_others = own, tuple(on_disk.values()), stats

    def lookup(self, content: bytes) -> bool:
        return self._own.lookup(content) and all(content in on_disk for on_disk in self._others)

    @property
    def stats(self) -> DiskStats:
        return DiskStats.of_ranks([self._own.stats, *self._stats_of_others.values()])
