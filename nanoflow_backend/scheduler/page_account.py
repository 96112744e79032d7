"""PageAccount gives sequences their pages of the KV cache, shares pages of common prefixes, and takes pages back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from nanoflow_backend.kvcache.content_hash import extend_hashes, reusable_pages
from nanoflow_backend.kvcache.device_tier import DeviceTier
from nanoflow_backend.kvcache.page_events import Medium, PageEvents
from nanoflow_backend.kvcache.tier import Transfer, TransferReport, leading_slots
from nanoflow_backend.scheduler.sequence import Sequence
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers


class KnownPrefix(NamedTuple):
    """Leading pages of a sequence that need not be computed."""

    pages: list[int]  # of the device, to be shared
    lower_pages: int  # pages behind those that tiers below can load


class PageAccount:
    """The only one to change a sequence's `pages`. Each page but the first of a sequence follows a full one.

    What is full of known tokens is offered to the tiers below, if there are any, and loaded from there when it is asked
    for again. Loaded pages can be found by others once they follow what is computed.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        prefix_caching: bool,
        lower: LowerTiers | None = None,
        events: PageEvents | None = None,
    ) -> None:
        self.page_tokens = page_tokens
        self._prefix_caching = prefix_caching
        self._device = DeviceTier(num_pages, on_evict=self._evicted)
        self._lower = lower
        self._events = events
        self.pool = self._device.pool

    def known_prefix(self, sequence: Sequence) -> KnownPrefix:
        """The leading tokens of a waiting sequence whose keys and values some tier has already."""
        if not self._prefix_caching or sequence.params.prompt_logprobs is not None:  # every row must be computed
            return KnownPrefix([], 0)
        limit = reusable_pages(len(sequence.tokens), self.page_tokens)
        extend_hashes(sequence.hashes, sequence.tokens, limit, self.page_tokens)
        pages = leading_slots(self._device, sequence.hashes[:limit])
        return KnownPrefix(pages, self._lower.leading(sequence.hashes[len(pages) : limit]) if self._lower else 0)

    def prefetch(self, sequence: Sequence) -> None:
        """A sequence waits: what it will load from the disk may come to host memory meanwhile."""
        if self._lower is None or self._lower.disk is None:
            return
        pages, lower_pages = self.known_prefix(sequence)
        if lower_pages:
            shared = len(pages)
            parent = sequence.hashes[shared - 1] if shared else None
            self._lower.prefetch(sequence.hashes[shared : shared + lower_pages], parent)

    def cost(self, sequence: Sequence, known: KnownPrefix) -> int:
        """Pages that come into use if the sequence is admitted now."""
        return self.pages_for(sequence) - sum(self.pool.references[page] > 0 for page in known.pages)

    def pages_for(self, sequence: Sequence) -> int:
        """Pages that its known tokens fill or begin."""
        return self._pages(len(sequence.tokens))

    def open(self, sequence: Sequence, known: KnownPrefix) -> None:
        """Take pages for all known tokens of a sequence, the leading ones by sharing; `load` says what is loaded."""
        pages, shared = self.pages_for(sequence), len(known.pages)
        sequence.shared_pages = pages - self.cost(sequence, known)
        for content, page in zip(sequence.hashes, known.pages, strict=False):
            self._device.load(content, page)
        sequence.pages = known.pages + self.pool.allocate(pages - shared)
        sequence.capacity_tokens = pages * self.page_tokens
        sequence.num_published_pages = shared
        sequence.num_computed_tokens = shared * self.page_tokens
        self._offer(sequence, range(shared))
        if self._lower and known.lower_pages:
            loaded = slice(shared, shared + known.lower_pages)
            parent = sequence.hashes[shared - 1] if shared else None
            sequence.load = self._lower.plan(shared, sequence.hashes[loaded], parent, sequence.pages[loaded])

    def meet(self, sequence: Sequence) -> int:
        """How far a sequence may compute: to the end of its known tokens, or up to pages that it should rather load.

        If computing has met loading, it goes on behind what was loaded.
        """
        plan = sequence.load
        if plan is None or self._lower is None:
            return len(sequence.tokens)
        if plan.met and sequence.num_computed_tokens == plan.back * self.page_tokens:
            sequence.load = None
            sequence.num_computed_tokens = plan.end * self.page_tokens
            self.publish(sequence)
            return len(sequence.tokens)
        return (plan.front + self._lower.pages_to_compute(plan)) * self.page_tokens

    def computed(self, sequence: Sequence) -> None:
        """A step computes its tokens up to `num_computed_tokens`: those pages are not loaded."""
        if sequence.load is not None:
            sequence.load.claim(self._pages(sequence.num_computed_tokens))

    def leave(self, sequence: Sequence) -> None:
        """No further step computes it: nothing more is loaded."""
        if sequence.load is not None and self._lower is not None:
            self._lower.drop(sequence.load)

    def grow(self, sequence: Sequence) -> int:
        """Take one more page, the last being full."""
        self.publish(sequence)
        (page,) = self.pool.allocate(1)
        sequence.pages.append(page)
        sequence.capacity_tokens += self.page_tokens
        return page

    def publish(self, sequence: Sequence) -> None:
        """Let others share the pages that are full of known tokens. The steps that fill them have been launched."""
        full = min(sequence.num_computed_tokens, len(sequence.tokens)) // self.page_tokens
        if self._prefix_caching and full > sequence.num_published_pages:
            extend_hashes(sequence.hashes, sequence.tokens, full, self.page_tokens)
            filled = range(sequence.num_published_pages, full)
            for index in filled:
                self._store(sequence, index)
            sequence.num_published_pages = full
            self._offer(sequence, filled)

    def close(self, sequence: Sequence) -> None:
        """Give all pages back. The steps that write them have returned."""
        self.publish(sequence)
        self.pool.release(reversed(sequence.pages))  # a prefix is of use to more requests than what follows it
        sequence.peak_pages = max(sequence.peak_pages, len(sequence.pages))
        sequence.pages, sequence.load = [], None
        sequence.num_computed_tokens = sequence.capacity_tokens = 0
        sequence.shared_pages = sequence.num_published_pages = 0

    def swap_out(self, sequence: Sequence) -> None:
        """It is preempted: keep what is full in the tier below, unless computing it again takes less time."""
        self.publish(sequence)
        if self._lower and self._lower.rates.is_swap_cheaper(sequence.num_published_pages):
            self._offer(sequence, range(sequence.num_published_pages), urgent=True)

    def freed_by(self, sequences: Iterable[Sequence]) -> int:
        """Pages that go out of use when these sequences close and stores have ended, at least."""
        held = self._lower.held_pages if self._lower else []
        stored = Counter(held)
        retired = sum(self.pool.references[page] - stored[page] == 1 for s in sequences for page in s.pages)
        return retired + sum(self.pool.references[page] == 1 for page in held)

    def begin_stores(self, returned_step: int, next_in: Sequence | None) -> list[Transfer]:
        """Copies to the tiers below that begin beside the next step, of what steps up to this one have filled.

        Args:
            next_in: waits for pages.
        """
        if self._lower is None:
            return []
        wanted = self.pages_for(next_in) if next_in else 0
        return self._lower.begin_stores(self._device, returned_step, self.pool.available - wanted)

    def begin_loads(self) -> list[Transfer]:
        """Copies from the tiers below that begin beside the next step."""
        return self._lower.begin_loads() if self._lower else []

    @property
    def transfers_outstanding(self) -> int:
        """Transfers that have begun, and not come back."""
        return self._lower.outstanding if self._lower else 0

    def returned(self, report: TransferReport) -> None:
        """Transfers have ended."""
        if self._lower is None:
            raise ValueError(f"transfers: expected none, as there is no tier below the device, got {report}")
        self._lower.returned(self._device, report)

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless these sequences, and no others, hold the pages, and none writes a shared one."""
        self._device.check()
        if self._lower is not None:
            self._lower.check()
        holders = [0] * self.pool.num_pages
        for page in self._lower.held_pages if self._lower else ():
            assert self._device.holds(page), f"page {page} is stored, and has lost its content"
            holders[page] += 1
        for s in sequences:
            name = f"request {s.id}"
            assert len(set(s.pages)) == len(s.pages), f"{name} holds a page twice"
            capacity_tokens = len(s.pages) * self.page_tokens
            assert s.num_computed_tokens <= s.capacity_tokens == capacity_tokens, f"{name} computed beyond its pages"
            for page in s.pages:
                holders[page] += 1
            for page in s.pages[s.num_computed_tokens // self.page_tokens :]:
                assert self.pool.references[page] == 1, f"{name} would write page {page}, which others read"
                assert not self._device.holds(page), f"{name} would write page {page}, which others can find"
        assert holders == self.pool.references, "reference counts are not the number of holders"

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def _offer(self, sequence: Sequence, indices: Iterable[int], *, urgent: bool = False) -> None:
        """Pages of these places of a sequence hold what the tier below may keep."""
        if self._lower is not None:
            for index in indices:
                parent = sequence.hashes[index - 1] if index else None
                self._lower.offer(sequence.hashes[index], parent, sequence.last_step, urgent=urgent)

    def _store(self, sequence: Sequence, index: int) -> None:
        content = sequence.hashes[index]
        if self._events is not None and self._device.lookup(content) is None:  # else others find another page
            parent = sequence.hashes[index - 1] if index else None
            token_ids = sequence.tokens[index * self.page_tokens : (index + 1) * self.page_tokens]
            self._events.stored(content, parent, token_ids, Medium.DEVICE)
        self._device.store(content, sequence.pages[index])

    def _evicted(self, content: bytes) -> None:
        """The device needs its page for something else."""
        if self._events is not None:
            self._events.removed(content, Medium.DEVICE)
