"""PagePool knows who holds which KV page, in ints."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or cached."""


class PagePool:
    """Every page is referenced by someone, or cached (its content may be asked for again), or free.

    Free pages are handed out first, then the least recently used cached ones. `on_evict(page)` is called before a
    cached page gets a new owner: the prefix index forgets the page there.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], object]) -> None:
        self.num_pages = num_pages
        self.references = [0] * num_pages
        self._on_evict = on_evict
        self._free = list(range(num_pages - 1, -1, -1))  # a stack, the lowest page on top
        self._retained: set[int] = set()  # pages to be cached when their last reference goes
        self._cached: OrderedDict[int, None] = OrderedDict()  # retained and unreferenced, least recently used first

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        return self.num_pages - self.available

    @property
    def cached(self) -> int:
        return len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages with one reference each, of unspecified content.

        Raises:
            OutOfPages: and takes none.
        """
        if count > self.available:
            raise OutOfPages(f"asked for {count} pages, {self.available} of {self.num_pages} are available")
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            self.references[page] = 1
            pages.append(page)
        return pages

    def share(self, page: int) -> None:
        """One more reference to a page that is referenced or cached. Raises: ValueError, it is neither."""
        if self.references[page] == 0:
            if page not in self._cached:
                raise ValueError(f"page {page} is free: nothing to share")
            del self._cached[page]
        self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference each. Of pages released together, the first is evicted first.

        Raises: ValueError, a page was released too often.
        """
        for page in pages:
            if self.references[page] == 0:
                raise ValueError(f"page {page} was released more often than it was taken")
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self._retained:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def retain(self, page: int) -> None:
        """Keep the content of a referenced page after its last reference, until the page is needed.

        Raises: ValueError, it is not referenced.
        """
        if self.references[page] == 0:
            raise ValueError(f"page {page} is not referenced: its content is nobody's")
        self._retained.add(page)

    def check(self) -> None:
        """Raise AssertionError if a page is lost, held twice, or in two places."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self.references) if count}
        assert len(free) == len(self._free), "a page is in the free list twice"
        assert all(count >= 0 for count in self.references), "a page has a negative reference count"
        assert len(free) + len(cached) + len(held) == self.num_pages, "a page is lost, or in two places"
        assert free | cached | held == set(range(self.num_pages)), "a page is lost, and another in two places"
        assert cached <= self._retained, "a page is cached that nobody asked to keep"
        assert not self._retained & free, "a page is to be kept and free"

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._retained.remove(page)
        self._on_evict(page)
        return page
