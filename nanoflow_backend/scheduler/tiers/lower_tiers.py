"""LowerTiers decides which pages move between the device, host memory and the disk, and knows what is on its way."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import takewhile

from nanoflow_backend.kvcache.device_tier import DeviceTier
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.tier import Move, PageIndex, Transfer, TransferReport
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.load_plan import LoadPlan
from nanoflow_backend.scheduler.tiers.rates import Rates
from nanoflow_backend.scheduler.tiers.stats import DROPS, Drop, TierStats
from nanoflow_backend.scheduler.tiers.store_queue import StoreQueue, Waiting
from nanoflow_backend.scheduler.tiers.transfers import Load, Transfers


class LowerTiers:
    """The scheduler's side of all tiers below the device; it sees contents, pages and slots.

    Storing: content is offered when a step that fills a page with it was launched. It is copied to host memory once
    that step has come back, so many pages a step, and to the disk behind that. Nobody waits for a store: content that
    leaves the device before its turn is dropped. So is a page whose predecessor no tier below has: it could not be
    found.

    Loading: `leading` says how much of a chain can be loaded, `plan` begins to. A page of the disk goes through a slot.
    """

    def __init__(
        self,
        host: HostTier,
        limits: TierLimits,
        rates: Rates,
        disk: PageIndex | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.host, self.disk, self.rates = host, disk, rates
        self._clock = clock
        self._limits = limits
        self._stores = StoreQueue(limits.keep, limits.most_seen)
        self._writes: deque[bytes] = deque()  # contents of host memory that the disk may not have
        self._plans: list[LoadPlan] = []  # with pages that are not issued yet, in order of admission
        self._read: deque[Load] = deque()  # what has come from the disk, and is pinned in host memory
        self._readers: dict[bytes, list[Load]] = {}  # of contents on their way from the disk
        self._wanted: deque[tuple[bytes, bytes | None]] = deque()  # of requests without pages: to be read, and parents
        self._transfers = Transfers()
        self._dropped: Counter[Drop] = Counter(dict.fromkeys(DROPS, 0))
        self._reported_s = self._arrived_s = clock()  # when a report came, and when the last one that had a load

    @property
    def has_work(self) -> bool:
        """Something is on its way, or waits for its turn."""
        return bool(self._transfers or self._stores or self._writes or self._plans or self._read or self._wanted)

    @property
    def outstanding(self) -> int:
        """Transfers on their way."""
        return len(self._transfers)

    @property
    def held_pages(self) -> list[int]:
        """Pages of the device that stores read; each has a reference for that."""
        return [o.transfer.page for o in self._transfers if o.transfer.move is Move.STORE]

    @property
    def stats(self) -> TierStats:
        disk = self.disk.stats if self.disk else None
        return TierStats.of(self.host, self._transfers, self._dropped, self._limits.page_bytes, disk)

    def offer(self, content: bytes, parent: bytes | None, step: int, *, urgent: bool = False) -> None:
        """The device will hold this content when `step` has come back. `urgent`: keep it in any case."""
        if self.host.knows(content):
            self.host.touch(content)
        else:
            self._stores.offer(Waiting(content, parent, step, urgent))

    def leading(self, contents: Iterable[bytes]) -> int:
        """How many of the leading contents can be loaded."""
        return sum(1 for _ in takewhile(self._has, contents))

    def prefetch(self, contents: Iterable[bytes], parent: bytes | None) -> None:
        """A request waits that will want these, in this order: bring them from the disk meanwhile."""
        for content in contents:
            if self.host.knows(content):
                self.host.touch(content)
            elif 2 * len(self._wanted) < self.host.num_slots:  # more would push out what comes before
                self._wanted.append((content, parent))
            parent = content

    def plan(self, first: int, contents: list[bytes], parent: bytes | None, pages: list[int]) -> LoadPlan:
        """Load contents, which `leading` has counted, into these pages of the device.

        Args:
            first: the place of the first in its sequence.
            parent: content of the page before that.
        """
        plan = LoadPlan(first, contents, pages, parent, self._clock())
        for content in contents:
            self.host.touch(content)
        plan.disk_pages = sum(not self.host.knows(content) for content in contents)
        self._plans.append(plan)
        return plan

    def drop(self, plan: LoadPlan) -> None:
        """Its sequence leaves. What is on its way to the device still comes, and nothing else."""
        plan.give_up()
        self._plans = [other for other in self._plans if other is not plan]
        for content, loads in self._readers.items():
            self._readers[content] = [load for load in loads if load.plan is not plan]
        kept = deque[Load]()
        for load in self._read:
            if load.plan is plan:
                self.host.unpin(plan.content(load.place))
            else:
                kept.append(load)
        self._read = kept
        coming = {o.load.place for o in self._transfers if o.load and o.load.plan is plan}
        for index in plan.outstanding - coming:
            plan.failed(index)

    def pages_to_compute(self, plan: LoadPlan) -> int:
        """How many of the pages that are not issued its sequence should compute, from the front."""
        before = takewhile(lambda other: other is not plan, self._plans)
        ahead = (
            self._transfers.on_their_way[Move.LOAD]
            + self._transfers.on_their_way[Move.READ]
            + sum(other.unissued for other in before)
        )
        waited_s = self._reported_s - max(plan.progress_s, self._arrived_s)
        return self.rates.pages_to_compute(plan.unissued, ahead, plan.disk_pages, waited_s)

    def begin_stores(self, device: DeviceTier, returned_step: int, spare_pages: int) -> list[Transfer]:
        """Copies of what steps up to `returned_step` have filled; they hold their pages of the device.

        Args:
            spare_pages: that the device can do without for now; pages in use are held anyway.
        """
        begun: list[Transfer] = []
        while len(begun) < self._limits.store_pages and (waiting := self._stores.next(returned_step)):
            content, parent, _, urgent = waiting
            page = device.lookup(content)
            if page is not None and not device.pool.references[page] and not urgent:
                if spare_pages <= 0:
                    break  # who waits for pages does not wait for stores
                spare_pages -= 1
            self._stores.remove(content)
            if self.host.knows(content):
                continue
            if page is None:
                self._dropped["left_device"] += 1
            elif not self._is_reachable(parent):
                self._dropped["no_predecessor"] += 1
            elif (slot := self.host.reserve(content, parent)) is None:
                self._dropped["no_slot"] += 1
            else:
                device.pool.share(page)
                begun.append(self._transfers.begin(Move.STORE, slot, content, page=page))
        while self._writes and self._transfers.on_their_way[Move.WRITE] < self._limits.disk_moves:
            content = self._writes.popleft()
            assert self.disk is not None, "there is no disk to write to"
            if self.host.lookup(content) is None:
                self._dropped["left_host"] += 1
            elif not self.disk.lookup(content):
                slot, parent = self.host.pin(content), self.host.parent(content)
                begun.append(self._transfers.begin(Move.WRITE, slot, content, parent=parent))
        return begun

    def begin_loads(self) -> list[Transfer]:
        """Copies to the device, of plans in their order, each from its back; and reads of the disk."""
        begun: list[Transfer] = []
        self._leave_late_reads()
        while self._read and self._transfers.on_their_way[Move.LOAD] < self._limits.load_pages:
            begun.append(self._begin_load(self._read.popleft(), pinned=True))
        for plan in self._plans:
            while (
                plan.unissued > self.pages_to_compute(plan)
                and self._transfers.on_their_way[Move.LOAD] < self._limits.load_pages
            ):
                content = plan.content(plan.back - 1)
                if self.host.lookup(content) is not None:
                    begun.append(self._begin_load(Load(plan, plan.take())))
                elif content in self._readers:
                    self._readers[content].append(Load(plan, plan.take()))
                elif self._transfers.on_their_way[Move.READ] >= self._limits.disk_moves:
                    break
                elif (read := self._begin_read(content, plan.content_before(plan.back - 1))) is not None:
                    self._readers[content].append(Load(plan, plan.take()))
                    begun.append(read)
                else:
                    plan.failed(plan.take())
        self._plans = [plan for plan in self._plans if plan.unissued]
        while self._wanted and self._transfers.on_their_way[Move.READ] < self._limits.disk_moves:
            content, parent = self._wanted.popleft()
            if not self.host.knows(content) and (read := self._begin_read(content, parent)) is not None:
                begun.append(read)
        return begun

    def returned(self, device: DeviceTier, report: TransferReport) -> None:
        """Transfers have ended: what was stored can be found, and pages and slots are free for others."""
        self.host.grow(report.slots)
        self._reported_s = self._clock()
        done, failed = self._transfers.end(report)
        stored: list[int] = []
        for transfer, content, load in done:
            match transfer.move:
                case Move.STORE:
                    self.host.commit(content)
                    stored.append(transfer.page)
                    if self.disk is not None:
                        self._writes.append(content)
                case Move.LOAD:
                    assert load is not None, "a load for nobody"
                    self.host.unpin(content)
                    load.plan.arrived(load.place)
                    load.plan.progress_s = self._arrived_s = self._reported_s
                case Move.WRITE:
                    self.host.unpin(content)
                case Move.READ:
                    self.host.commit(content)
                    for reader in self._readers.pop(content):
                        self.host.pin(content)
                        self._read.append(reader)
                        reader.plan.read.add(reader.place)
                        reader.plan.progress_s = self._reported_s
        for transfer, content, _ in failed:
            if transfer.move is Move.WRITE:
                self.host.unpin(content)
            else:
                self.host.abandon(content)
                for reader in self._readers.pop(content):
                    reader.plan.failed(reader.place)
        device.pool.release(reversed(stored))  # a prefix is of use to more requests than what follows it
        moved = Counter(each.transfer.move for each in done)
        for move, rate in ((Move.STORE, self.rates.store), (Move.LOAD, self.rates.load), (Move.READ, self.rates.read)):
            rate.measured(moved[move], report.seconds[move])

    def abandon(self) -> int:
        """Nothing will be reported any more. Returns the pages that were on their way down, or waited for that: they
        count as dropped."""
        down = sum(self._transfers.on_their_way[move] for move in (Move.STORE, Move.WRITE))
        lost = down + len(self._stores) + sum(not self._is_on_disk(content) for content in self._writes)
        self._dropped["closed"] += lost
        return lost

    def check(self) -> None:
        """Raise AssertionError if a slot is lost, or an account is wrong."""
        self.host.check()
        assert Counter(o.transfer.move for o in self._transfers) == +self._transfers.on_their_way, "miscounted moves"
        assert all(plan.unissued for plan in self._plans), "a plan has nothing left to issue"
        readers = {o.content for o in self._transfers if o.transfer.move is Move.READ}
        assert readers == self._readers.keys(), "a reader waits for nothing"

    def _has(self, content: bytes) -> bool:
        return self.host.lookup(content) is not None or content in self._readers or self._is_on_disk(content)

    def _is_on_disk(self, content: bytes) -> bool:
        return self.disk is not None and self.disk.lookup(content)

    def _is_reachable(self, parent: bytes | None) -> bool:
        return parent is None or self.host.knows(parent) or self._is_on_disk(parent)

    def _leave_late_reads(self) -> None:
        """Who waits for the disk for longer than it takes to compute all that is missing, twice, computes it."""
        for content, loads in self._readers.items():
            late = {id(load.plan) for load in loads if self._is_late(load.plan)}
            for load in loads:
                if id(load.plan) in late:
                    load.plan.failed(load.place)
            self._readers[content] = [load for load in loads if id(load.plan) not in late]

    def _is_late(self, plan: LoadPlan) -> bool:
        compute_s = self.rates.compute_s(len(plan.outstanding))
        return compute_s is not None and not plan.unissued and self._reported_s - plan.progress_s > 2 * compute_s

    def _begin_load(self, load: Load, *, pinned: bool = False) -> Transfer:
        content = load.plan.content(load.place)
        slot = self.host.lookup(content) if pinned else self.host.pin(content)
        assert slot is not None, "what is pinned stays"
        return self._transfers.begin(Move.LOAD, slot, content, page=load.plan.page(load.place), load=load)

    def _begin_read(self, content: bytes, parent: bytes | None) -> Transfer | None:
        """None: it is on no disk, or there is no slot for it."""
        if self.host.knows(content) or not self._is_on_disk(content):
            return None
        slot = self.host.reserve(content, parent)
        if slot is None:
            return None
        self._readers[content] = []
        return self._transfers.begin(Move.READ, slot, content)
