"""PageAccount gives sequences their pages of the KV cache, shares pages of common prefixes, and takes pages back."""

from __future__ import annotations

from collections.abc import Iterable

from nanoflow_backend.kvcache.pages import PagePool
from nanoflow_backend.kvcache.prefix import PrefixIndex
from nanoflow_backend.scheduler.sequence import Sequence


class PageAccount:
    """The only one to change a sequence's `pages`. Each page but the first of a sequence follows a full one."""

    def __init__(self, num_pages: int, page_tokens: int, prefix_caching: bool) -> None:
        self.page_tokens = page_tokens
        self._prefix_caching = prefix_caching
        self._prefix = PrefixIndex(page_tokens)
        self.pool = PagePool(num_pages, on_evict=self._prefix.forget)

    def known_prefix(self, sequence: Sequence) -> list[int]:
        """Pages that hold the leading tokens of a waiting sequence already."""
        if not self._prefix_caching or sequence.params.prompt_logprobs is not None:  # every row must be computed
            return []
        return self._prefix.lookup(sequence.digests, sequence.tokens)

    def cost(self, sequence: Sequence, known: list[int]) -> int:
        """Pages that come into use if the sequence is admitted now."""
        return self.pages_for(sequence) - sum(self.pool.references[page] > 0 for page in known)

    def pages_for(self, sequence: Sequence) -> int:
        """Pages that its known tokens fill or begin."""
        return -(-len(sequence.tokens) // self.page_tokens)

    def open(self, sequence: Sequence, known: list[int]) -> None:
        """Take pages for all known tokens of a sequence, the leading ones by sharing."""
        pages = self.pages_for(sequence)
        sequence.shared_pages = pages - self.cost(sequence, known)
        for page in known:
            self.pool.share(page)
        sequence.pages = known + self.pool.allocate(pages - len(known))
        sequence.capacity_tokens = pages * self.page_tokens
        sequence.num_published_pages = len(known)
        sequence.num_computed_tokens = len(known) * self.page_tokens

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
            self._prefix.extend(sequence.digests, sequence.tokens, full)
            for index in range(sequence.num_published_pages, full):
                if self._prefix.publish(sequence.digests[index], sequence.pages[index]):
                    self.pool.retain(sequence.pages[index])
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

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Raise AssertionError unless these sequences, and no others, hold the pages, and none writes a shared one."""
        self.pool.check()
        self._prefix.check()
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
                assert not self._prefix.holds(page), f"{name} would write page {page}, which others can find"
        assert holders == self.pool.references, "reference counts are not the number of holders"
