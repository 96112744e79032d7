"""RankReports joins what the ranks say of their transfers: a page has moved when every rank's part of it has."""

from __future__ import annotations

import threading
from collections import Counter

from nanoflow_backend.kvcache.tier import TransferReport


class RankReports:
    """Any thread may `add`; one calls `join`."""

    def __init__(self, ranks: int) -> None:
        """`ranks` of the group, rank 0 included."""
        self._ranks = ranks
        self._lock = threading.Lock()
        self._came: list[TransferReport] = []  # of other ranks, since the last join
        self._slots = dict.fromkeys(range(1, ranks), 0)
        self._ended: Counter[int] = Counter()  # ranks that are done with a transfer, by its id
        self._failed: set[int] = set()  # on some rank, while it goes on on others

    def add(self, rank: int, report: TransferReport) -> None:
        """What a rank other than 0 says."""
        with self._lock:
            self._came.append(report)
            self._slots[rank] = report.slots

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
