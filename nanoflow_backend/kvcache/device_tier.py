"""DeviceTier is the pages of the device itself, the first tier in which content is looked up."""

from __future__ import annotations

from collections.abc import Callable

from nanoflow_backend.kvcache.pages import PagePool
from nanoflow_backend.kvcache.prefix import PrefixIndex


class DeviceTier:
    """A Tier (see there) of the pages that requests compute on, so that nothing has to be copied.

    What is stored is shared with whoever loads it, and stays for as long as somebody holds the page, or nobody needs it
    for other content. `on_evict` is called with the content then.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[bytes], None] = lambda content: None) -> None:
        self._index = PrefixIndex()
        self.pool = PagePool(num_pages, on_evict=lambda page: on_evict(self._index.forget(page)))

    def lookup(self, content: bytes) -> int | None:
        """See Tier."""
        return self._index.lookup(content)

    def store(self, content: bytes, page: int) -> None:
        """Let others find content in a page, which is referenced, and filled by a step that has been launched."""
        if self._index.publish(content, page):
            self.pool.retain(page)

    def load(self, content: bytes, page: int) -> None:
        """Take a reference to the page that `lookup` finds.

        Raises: KeyError, the page holds other content.
        """
        if self._index.lookup(content) != page:
            raise KeyError(f"page {page} does not hold this content")
        self.pool.share(page)

    def holds(self, page: int) -> bool:
        """Whether others can find this page by its content."""
        return self._index.holds(page)

    def check(self) -> None:
        """See Tier; of the pool, too."""
        self.pool.check()
        self._index.check()
