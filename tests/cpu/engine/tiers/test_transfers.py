"""Transfers of one rank, and the reports of several: what has ended is told once, and only when it has."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from nanoflow_backend.engine.tiers.rank_reports import RankReports
from nanoflow_backend.engine.tiers.transfers import TierTransfers
from nanoflow_backend.kvcache.disk.disk_stats import DiskStats
from nanoflow_backend.kvcache.host_pool import HostPool
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.kvcache.tier import Move, Transfer, TransferReport
from nanoflow_backend.runtime.page_copies import CpuPageCopies


class SlowCopies:
    """Copies that end when a test says so."""

    def __init__(self) -> None:
        self.begun: list[SlowCopy] = []

    def begin(self, pages: list[int], slots: list[int], *, to_host: bool, after: object = None) -> SlowCopy:
        self.begun.append(SlowCopy(pages, slots, to_host, after))
        return self.begun[-1]


class SlowCopy:
    def __init__(self, *asked: object) -> None:
        self.asked = asked
        self.took_s: float | None = None

    def seconds(self) -> float | None:
        return self.took_s


class OneWriter:
    """A disk that has room for one move at a time, and fails every other one."""

    def __init__(self) -> None:
        self.payloads: dict[int, memoryview] = {}
        self.ended: list[tuple[int, bool]] = []

    def write(self, ticket: int, content: bytes, payload: memoryview, parent: bytes) -> bool:
        return self.read(ticket, content, payload)

    def read(self, ticket: int, content: bytes, payload: memoryview) -> bool:
        if self.payloads:
            return False
        self.payloads[ticket] = payload
        return True

    def end(self, done: bool) -> None:
        self.ended.append((self.payloads.popitem()[0], done))

    def poll(self) -> list[tuple[int, bool]]:
        ended, self.ended = self.ended, []
        return ended

    def close(self) -> bool:
        return True


@pytest.fixture
def kv() -> KvPages:
    return KvPages(torch.arange(2 * 6 * 2 * 3, dtype=torch.float32).view(2, 6, 2, 1, 1, 3))


def test_copies_are_reported_when_they_have_ended_with_the_time_that_they_took(kv: KvPages) -> None:
    copies = SlowCopies()
    transfers = TierTransfers(copies, HostPool(kv, 4))
    event = object()
    stores = [Transfer(1, Move.STORE, 3, page=5), Transfer(3, Move.STORE, 0, page=2)]
    transfers.begin([stores[0], Transfer(2, Move.LOAD, 1, page=4), stores[1]], event)
    assert [copy.asked for copy in copies.begun] == [([5, 2], [3, 0], True, event), ([4], [1], False, event)]
    assert transfers.report() == TransferReport(slots=4)
    copies.begun[1].took_s = 0.5
    assert transfers.report() == TransferReport([2], slots=4, seconds=(0.0, 0.5, 0.0, 0.0))
    assert transfers.report() == TransferReport(slots=4)
    copies.begun[0].took_s = 0.25
    assert transfers.report() == TransferReport([1, 3], slots=4, seconds=(0.25, 0.0, 0.0, 0.0))


def test_who_waits_is_told_as_soon_as_something_ends_and_not_kept_for_long(kv: KvPages) -> None:
    copies = SlowCopies()
    transfers = TierTransfers(copies, HostPool(kv, 4))
    transfers.begin([Transfer(1, Move.STORE, 3, page=5)])
    assert transfers.report(wait=True).done == [], "2 ms, and new requests are taken"
    threading.Timer(5e-4, lambda: setattr(copies.begun[0], "took_s", 1.0)).start()
    reports = [transfers.report(wait=True) for _ in range(500) if copies.begun[0].took_s is None]
    assert (reports or [transfers.report()])[-1].done == [1]


def test_moves_of_the_disk_work_on_the_slots_themselves_and_may_fail(kv: KvPages) -> None:
    disk, pool = OneWriter(), HostPool(kv, 4)
    transfers = TierTransfers(CpuPageCopies(kv, pool), pool, disk)
    transfers.begin([Transfer(1, Move.STORE, 2, page=3)])
    assert transfers.report().done == [1]
    transfers.begin([Transfer(2, Move.WRITE, 2, content=b"c"), Transfer(3, Move.READ, 1, content=b"d")])
    assert disk.payloads[2].tobytes() == kv.tensor[:, 3].contiguous().numpy().tobytes()
    assert transfers.report().failed == [3], "there was no room for it"
    disk.end(done=True)
    report = transfers.report()
    assert (report.done, report.failed) == ([2], [])
    assert report.seconds[Move.WRITE] > 0
    transfers.begin([Transfer(4, Move.READ, 0, content=b"e")])
    disk.payloads[4][:] = kv.tensor[:, 5].contiguous().numpy().tobytes()
    disk.end(done=True)
    transfers.begin([Transfer(5, Move.LOAD, 0, page=1)])
    assert transfers.report().done == [5, 4]
    assert torch.equal(kv.tensor[:, 1], kv.tensor[:, 5])
    transfers.close()


def test_without_a_disk_its_moves_are_refused(kv: KvPages) -> None:
    transfers = TierTransfers(SlowCopies(), HostPool(kv, 4))
    with pytest.raises(ValueError, match="transfers: expected none of the disk, as there is none"):
        transfers.begin([Transfer(1, Move.READ, 0)])


def test_a_page_has_moved_when_every_rank_has_moved_it() -> None:
    reports = RankReports(3)
    assert reports.join(TransferReport([1, 2], slots=9, seconds=(1.0, 0.0, 0.0, 0.0))) == TransferReport(
        seconds=(1.0, 0.0, 0.0, 0.0)
    ), "the others have no slots yet"
    reports.add(1, TransferReport([2, 1], slots=5))
    reports.add(2, TransferReport([1], [2], slots=7))
    assert reports.join(TransferReport([3], slots=9)) == TransferReport([1], [2], slots=5)
    for rank in (1, 2):
        reports.add(rank, TransferReport([3], slots=6))
    assert reports.join(TransferReport(slots=9)) == TransferReport([3], slots=6)


@pytest.mark.parametrize("seed", range(5))
def test_each_transfer_is_reported_once_whatever_the_order(seed: int) -> None:
    rng, ranks = random.Random(seed), 4
    reports = RankReports(ranks)
    left = [rng.sample(range(50), 50) for _ in range(ranks)]
    fails = [{id for id in range(50) if rng.random() < 0.1} for _ in range(ranks)]
    done: list[int] = []
    failed: list[int] = []
    while any(left):
        for rank in range(ranks):
            ended = [left[rank].pop() for _ in range(min(len(left[rank]), rng.randint(0, 5)))]
            report = TransferReport(
                [id for id in ended if id not in fails[rank]], [id for id in ended if id in fails[rank]], slots=1
            )
            if rank:
                reports.add(rank, report)
            else:
                own = report
        joined = reports.join(own)
        done += joined.done
        failed += joined.failed
    assert sorted(failed) == sorted(set.union(*fails))
    assert sorted(done + failed) == list(range(50))


class Own:
    """The index of rank 0."""

    stats = DiskStats(pages=2, failed=1)

    def lookup(self, content: bytes) -> bool:
        return content in (b"a", b"b")


def test_a_page_is_there_if_each_rank_has_told_of_it_and_not_taken_it_back() -> None:
    reports = RankReports(3)
    index = reports.index(Own())
    reports.add(1, TransferReport(slots=4, found=[b"a", b"b", b"c"]))
    assert not index.lookup(b"a"), "rank 2 has said nothing"
    reports.add(2, TransferReport(found=[b"a"], disk=DiskStats(failed=2)))
    assert [index.lookup(content) for content in (b"a", b"b", b"c")] == [True, False, False]
    assert (index.stats.pages, index.stats.failed) == (2, 3)
    reports.add(1, TransferReport(gone=[b"a"]))
    assert not index.lookup(b"a")
    reports.add(2, TransferReport(slots=3))
    assert reports.join(TransferReport(slots=9)).slots == 3, "news of the disk say nothing of slots"
