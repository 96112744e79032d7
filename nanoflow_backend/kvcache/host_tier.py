"""HostTier knows which slot of host memory holds which content, in ints, and which content goes first."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from nanoflow_backend.kvcache.page_events import Medium, PageEvents


@dataclass(slots=True)
class _Entry:
    slot: int
    parent: bytes | None  # content of the page before
    last_use: int
    whole: bool = False  # the transfer that fills the slot has ended
    pins: int = 0


class _Candidate(NamedTuple):
    """Content that could go, as it was at its last use."""

    last_use: int
    content: bytes


class HostTier:
    """A Tier (see there) of slots, of which there may be more later.

    A slot is reserved for content that is on its way, and found once that is whole. When there is no free slot, content
    goes: the least recently used of what no other content follows, so that a chain is shortened from its end, where
    it is of use to the fewest. What is pinned, or not whole yet, stays. `events` are told what can be found here.
    """

    def __init__(self, events: PageEvents | None = None) -> None:
        self._events = events
        self.num_slots = 0
        self.evicted = 0  # contents that had to go
        self._entries: dict[bytes, _Entry] = {}
        self._children: Counter[bytes] = Counter()  # entries whose page before this content is
        self._free: list[int] = []  # a stack, the lowest slot on top
        self._candidates: list[_Candidate] = []  # a heap; some have been used or have children by now
        self._uses = 0

    def __len__(self) -> int:
        """Slots that hold content, or wait for it."""
        return len(self._entries)

    def grow(self, num_slots: int) -> None:
        """There are so many slots now. Never fewer than before."""
        if num_slots > self.num_slots:
            self._free = [*range(num_slots - 1, self.num_slots - 1, -1), *self._free]
            self.num_slots = num_slots

    def lookup(self, content: bytes) -> int | None:
        """See Tier."""
        entry = self._entries.get(content)
        return entry.slot if entry and entry.whole else None

    def knows(self, content: bytes) -> bool:
        """It is here, or on its way."""
        return content in self._entries

    def touch(self, content: bytes) -> None:
        """It is of use now. Content that is not here is left alone."""
        if entry := self._entries.get(content):
            self._use(content, entry)

    def reserve(self, content: bytes, parent: bytes | None) -> int | None:
        """A slot for content that is not here, pinned until it is whole. None: every slot is in use.

        `parent` is the content of the page before it; None: it is a first page.
        """
        assert content not in self._entries, "it is here, or on its way"
        slot = self._free.pop() if self._free else self._evict()
        if slot is None:
            return None
        entry = self._entries[content] = _Entry(slot, parent, 0, pins=1)
        if parent is not None:
            self._children[parent] += 1
        self._use(content, entry)
        return slot

    def commit(self, content: bytes) -> None:
        """What was reserved for is whole, and its pin is gone."""
        self._entries[content].whole = True
        if self._events is not None:
            self._events.copied(content, Medium.HOST)
        self.unpin(content)

    def abandon(self, content: bytes) -> None:
        """What was reserved for has not come."""
        self._remove(content)

    def pin(self, content: bytes) -> int:
        """The slot of content that is here, which stays until it is unpinned as often."""
        entry = self._entries[content]
        entry.pins += 1
        self._use(content, entry)
        return entry.slot

    def parent(self, content: bytes) -> bytes | None:
        """Content of the page before the one that holds this; None: it is a first page."""
        return self._entries[content].parent

    def unpin(self, content: bytes) -> None:
        entry = self._entries[content]
        entry.pins -= 1
        self._offer(content, entry)

    def check(self) -> None:
        """See Tier."""
        slots = [entry.slot for entry in self._entries.values()]
        assert sorted(slots + self._free) == list(range(self.num_slots)), "a slot is lost, or in two places"
        children = Counter(entry.parent for entry in self._entries.values() if entry.parent is not None)
        assert children == self._children, "children are miscounted"
        assert all(entry.whole or entry.pins for entry in self._entries.values()), "a slot waits for nothing"
        listed = set(self._candidates)
        for content, entry in self._entries.items():
            assert entry.pins >= 0, "content is pinned less than not at all"
            if self._may_go(content, entry):
                assert (entry.last_use, content) in listed, "content can never go"

    def _use(self, content: bytes, entry: _Entry) -> None:
        self._uses += 1
        entry.last_use = self._uses
        self._offer(content, entry)

    def _offer(self, content: bytes, entry: _Entry) -> None:
        """It may have become the next to go."""
        if self._may_go(content, entry):
            heapq.heappush(self._candidates, _Candidate(entry.last_use, content))
        if len(self._candidates) > 4 * len(self._entries) + 64:
            self._candidates = [c for c in set(self._candidates) if self._is_current(c)]
            heapq.heapify(self._candidates)

    def _may_go(self, content: bytes, entry: _Entry) -> bool:
        return not entry.pins and not self._children[content]

    def _is_current(self, candidate: _Candidate) -> bool:
        entry = self._entries.get(candidate.content)
        return entry is not None and entry.last_use == candidate.last_use and self._may_go(candidate.content, entry)

    def _evict(self) -> int | None:
        while self._candidates:
            candidate = heapq.heappop(self._candidates)
            if self._is_current(candidate):
                self.evicted += 1
                self._remove(candidate.content)
                return self._free.pop()
        return None

    def _remove(self, content: bytes) -> None:
        entry = self._entries.pop(content)
        if entry.whole and self._events is not None:
            self._events.removed(content, Medium.HOST)
        self._free.append(entry.slot)
        if entry.parent is not None:
            self._children[entry.parent] -= 1
            if not self._children[entry.parent]:
                del self._children[entry.parent]
                if parent := self._entries.get(entry.parent):
                    self._offer(entry.parent, parent)
