"""PageAccount gives sequences their pages of the KV cache, shares pages of common prefixes, and takes pages back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from nanoflow_backend.kvcache.content_hash import extend_hashes, reusable_pages
from nanoflow_backend.kvcache.device_tier import DeviceTier
from nanoflow_backend.kvcache.page_events import Medium, PageEvents
from nanoflow_backend.kvcache.tier import Tier, Transfer, leading_slots
from nanoflow_backend.scheduler.sequence import Sequence


class KnownPrefix(NamedTuple):
    """Leading pages of a sequence that need not be computed."""

    pages: list[int]  # of the device, to be shared
    lower_pages: int  # pages behind those that the tier below can load


class PageAccount:
    """The only one to change a sequence's `pages`. Each page but the first of a sequence follows a full one.

    What is evicted from the device goes to the tier below, if there is one, and is loaded from there when it is asked
    for again. Loaded pages can be found by others once they are published, when their load has come back.
    """

    def __init__(
        self,
        num_pages: int,
        page_tokens: int,
        prefix_caching: bool,
        lower_tier: Tier | None = None,
        events: PageEvents | None = None,
    ) -> None:
        self.page_tokens = page_tokens
        self._prefix_caching = prefix_caching
        self._device = DeviceTier(num_pages, on_evict=self._evict)
        self._lower = lower_tier
        self._events = events
        self._transfers: list[Transfer] = []
        self.pool = self._device.pool

    def known_prefix(self, sequence: Sequence) -> KnownPrefix:
        """The leading tokens of a waiting sequence whose keys and values some tier has already."""
        if not self._prefix_caching or sequence.params.prompt_logprobs is not None:  # every row must be computed
            return KnownPrefix([], 0)
        limit = reusable_pages(len(sequence.tokens), self.page_tokens)
        extend_hashes(sequence.hashes, sequence.tokens, limit, self.page_tokens)
        pages = leading_slots(self._device, sequence.hashes[:limit])
        if self._lower is None:
            return KnownPrefix(pages, 0)
        return KnownPrefix(pages, len(leading_slots(self._lower, sequence.hashes[len(pages) : limit])))

    def cost(self, sequence: Sequence, known: KnownPrefix) -> int:
        """Pages that come into use if the sequence is admitted now."""
        return self.pages_for(sequence) - sum(self.pool.references[page] > 0 for page in known.pages)

    def pages_for(self, sequence: Sequence) -> int:
        """Pages that its known tokens fill or begin."""
        return -(-len(sequence.tokens) // self.page_tokens)

    def open(self, sequence: Sequence, known: KnownPrefix) -> bool:
        """Take pages for all known tokens of a sequence, the leading ones by sharing and loading.

        Returns whether some are loaded: then no step may read them before the step with their transfers has come back.
        """
        pages, shared = self.pages_for(sequence), len(known.pages)
        sequence.shared_pages = pages - self.cost(sequence, known)
        for content, page in zip(sequence.hashes, known.pages, strict=False):
            self._device.load(content, page)
        fresh = self.pool.allocate(pages - shared)
        sequence.pages = known.pages + fresh
        loaded = self._load(sequence.hashes[shared : shared + known.lower_pages], fresh)
        sequence.capacity_tokens = pages * self.page_tokens
        sequence.num_published_pages = shared
        sequence.num_computed_tokens = (shared + loaded) * self.page_tokens
        return loaded > 0

    def grow(self, sequence: Sequence) -> int:
        """Take one more page, the last being full."""
        self.publish(sequence)
        (page,) = self.pool.allocate(1)
        sequence.pages.append(page)
        sequence.capacity_tokens += self.page_tokens
        return page

    def publish(self, sequence: Sequence) -> None:
        """Let others share the pages that are full of known tokens. The steps that fill them have been launched, and
        those that load them have come back."""
        full = min(sequence.num_computed_tokens, len(sequence.tokens)) // self.page_tokens
        if self._prefix_caching and full > sequence.num_published_pages:
            extend_hashes(sequence.hashes, sequence.tokens, full, self.page_tokens)
            for index in range(sequence.num_published_pages, full):
                self._store(sequence, index)
            sequence.num_published_pages = full

    def close(self, sequence: Sequence) -> None:
        """Give all pages back. The steps that write them have returned."""
        self.publish(sequence)
        self.pool.release(reversed(sequence.pages))  # a prefix is of use to more requests than what follows it
        sequence.peak_pages = max(sequence.peak_pages, len(sequence.pages))
        sequence.pages = []
        sequence.num_computed_tokens = sequence.capacity_tokens = 0
        sequence.shared_pages = sequence.num_published_pages = 0

    def freed_by(self, sequences: Iterable[Sequence]) -> int:
        """Pages that go out of use when these sequences close, at least."""
        return sum(self.pool.references[page] == 1 for s in sequences for page in s.pages)

    def take_transfers(self) -> list[Transfer]:
        """The copies that pages taken since the last call need, in their order: they belong to the next step."""
        taken, self._transfers = self._transfers, []
        return taken

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless these sequences, and no others, hold the pages, and none writes a shared one."""
        self._device.check()
        if self._lower is not None:
            self._lower.check()
        assert not self._transfers, "a step left transfers behind"
        holders = [0] * self.pool.num_pages
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

    def can_be_found(self, page: int) -> bool:
        """Whether other sequences can find this page by its content."""
        return self._device.holds(page)

    def _load(self, contents: list[bytes], pages: list[int]) -> int:
        """Load contents into these pages, as many as the tier still has: pages were taken, and so others stored."""
        loaded = 0
        for content, page in zip(contents, pages, strict=False):
            if self._lower is None or self._lower.lookup(content) is None:
                break
            self._add(self._lower.load(content, page))
            loaded += 1
        return loaded

    def _evict(self, content: bytes, page: int) -> None:
        """The device needs a page for something else."""
        if self._lower is not None:
            self._add(self._lower.store(content, page))
        if self._events is not None:  # last: a page that goes down a tier is never said to be nowhere
            self._events.removed(content, Medium.DEVICE)

    def _store(self, sequence: Sequence, index: int) -> None:
        content = sequence.hashes[index]
        if self._events is not None and self._device.lookup(content) is None:  # else others find another page
            parent = sequence.hashes[index - 1] if index else None
            token_ids = sequence.tokens[index * self.page_tokens : (index + 1) * self.page_tokens]
            self._events.stored(content, parent, token_ids, Medium.DEVICE)
        self._device.store(content, sequence.pages[index])

    def _add(self, transfer: Transfer | None) -> None:
        if transfer is not None:
            self._transfers.append(transfer)
