"""eviction_order says which pages of a full disk go first: the least recently used of those that no other follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import NamedTuple


class StoredPage(NamedTuple):
    """A page's file, as its name says."""

    used_ns: int  # when it was written, or last read
    size: int  # bytes
    name: str
    key: str  # of its layout and content
    parent: str  # the key of the page before it; that of no page for the first


def eviction_order(pages: Iterable[StoredPage]) -> Iterator[StoredPage]:
    """All pages, in the order in which they may go.

    A chain of pages is read from its front, so a page is of no use without those before it: always the least recently
    used of those goes that no other page follows.
    """
    pages = list(pages)
    by_key = {page.key: page for page in pages}
    followers = Counter(page.parent for page in by_key.values() if page.parent in by_key)
    leaves = [page for page in by_key.values() if not followers[page.key]]
    heapify(leaves)
    gone = set()
    while leaves:
        leaf = heappop(leaves)
        gone.add(leaf.name)
        yield leaf
        if leaf.parent in by_key:
            followers[leaf.parent] -= 1
            if not followers[leaf.parent]:
                heappush(leaves, by_key[leaf.parent])
    yield from sorted(page for page in pages if page.name not in gone)  # names that follow each other in a circle
