"""TieredScheduler: a scheduler of a few pages over host memory, whose transfers end when a test says so."""

from __future__ import annotations

from array import array
from typing import Any

from msgspec.structs import replace

from nanoflow_backend.bench.reservation import ReserveNothing
from nanoflow_backend.kvcache.content_hash import extend_hashes
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.tier import Move, PageIndex, Transfer, TransferReport
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Batch, Delta, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.tiers.rates import Rates

PAGES, PAGE_TOKENS = 6, 2
FIRST = list(range(10, 19))  # four full pages and a token
SECOND = list(range(30, 41))  # needs every page of a device that has PAGES


class TieredScheduler:
    """Steps come back one by one, or as a test calls `form` and `end`.

    Attributes:
        transfers: that have begun, and of which nobody has said that they ended.
    """

    def __init__(
        self,
        num_pages: int = PAGES,
        host_slots: int = 20,
        disk: PageIndex | None = None,
        tier_limits: dict[str, Any] | None = None,
        **limits: int,
    ) -> None:
        limits = {"dense_batch_tokens": 16, "chunk_tokens": 16, "prompt_tokens": 16, "max_running": 4} | limits
        limits = {"max_queue_size": 8, "page_tokens": PAGE_TOKENS, "max_model_tokens": 64} | limits
        most = {"page_bytes": 100, "store_pages": 8, "load_pages": 8, "disk_moves": 4}
        self.host = HostTier()
        self.host.grow(host_slots)
        self.now_s = 0.0
        rates = Rates(PAGE_TOKENS)
        self.lower = LowerTiers(
            self.host, TierLimits(**most | (tier_limits or {})), rates, disk, clock=lambda: self.now_s
        )
        self.scheduler = Scheduler(
            SchedulerLimits(num_pages=num_pages, **limits),
            eos_token_ids=[0],
            clock=lambda: self.now_s,
            forecast=ReserveNothing(),
            lower=self.lower,
        )
        self.transfers: list[Transfer] = []
        self.moved: list[Transfer] = []

    def add(self, id: int, prompt: list[int], max_tokens: int = 1) -> None:
        self.scheduler.add(Request(id, prompt, SamplingParams(max_tokens=max_tokens)))

    def form(self) -> Batch:
        batch = self.scheduler.schedule()
        self.check()
        assert batch is not None
        self.transfers += batch.transfers
        self.moved += batch.transfers
        return batch

    def end(self, batch: Batch, moves: Any = tuple(Move), failed: Any = (), load_page_s: float = 0.0) -> list[Delta]:
        """A step comes back, and with it all transfers of these kinds that have begun."""
        ended = [t for t in self.transfers if t.move in moves or t.move in failed]
        self.transfers = [t for t in self.transfers if t not in ended]
        report = TransferReport(
            done=[t.id for t in ended if t.move not in failed],
            failed=[t.id for t in ended if t.move in failed],
            seconds=(0.0, load_page_s * sum(t.move is Move.LOAD for t in ended), 0.0, 0.0),
        )
        sampled = Sampled(batch.step, [7] * len(batch.sampled_slots), transfers=report)
        deltas = self.scheduler.retire(sampled)
        self.check()
        return [replace(delta, account=None) for delta in deltas]

    def step(self) -> list[Delta]:
        return self.end(self.form())

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        while self.scheduler.has_work:
            deltas += self.step()
        return deltas

    def check(self) -> None:
        self.scheduler.check()
        self.lower.check()

    def count(self, move: Move) -> int:
        """Transfers of a kind that have begun so far."""
        return sum(t.move is move for t in self.moved)


def contents(tokens: list[int]) -> list[bytes]:
    """Of the full pages that begin with these tokens."""
    hashes: list[bytes] = []
    extend_hashes(hashes, array("i", tokens), len(tokens) // PAGE_TOKENS, PAGE_TOKENS)
    return hashes


def evicted(num_pages: int = PAGES, **options: Any) -> TieredScheduler:
    """One whose device had FIRST, and has given its pages away since: host memory has them."""
    s = TieredScheduler(num_pages, **options)
    for id, prompt in enumerate((FIRST, list(range(30, 29 + num_pages * PAGE_TOKENS)))):
        s.add(id, prompt)
        s.finish()
    assert s.count(Move.STORE) >= 4
    assert s.count(Move.LOAD) == 0
    s.moved = []
    return s
