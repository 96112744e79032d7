"""HostTier: a tier in ints below the device, of so many slots; what was asked for least recently goes first."""

from __future__ import annotations

from collections import OrderedDict

from nanoflow_backend.kvcache.tier import Direction, Transfer


class HostTier:
    """A Tier, see there."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.stores = self.loads = self.drops = 0
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # by content, least recently used first

    def lookup(self, content: bytes) -> int | None:
        return self._slots.get(content)

    def store(self, content: bytes, page: int) -> Transfer | None:
        if content in self._slots or not self.num_slots:
            return None
        slot = len(self._slots)
        if slot == self.num_slots:
            _, slot = self._slots.popitem(last=False)
            self.drops += 1
        self._slots[content] = slot
        self.stores += 1
        return Transfer(page, slot, Direction.STORE)

    def load(self, content: bytes, page: int) -> Transfer:
        self._slots.move_to_end(content)
        self.loads += 1
        return Transfer(page, self._slots[content], Direction.LOAD)

    def check(self) -> None:
        assert sorted(self._slots.values()) == list(range(len(self._slots))), "a slot is lost, or in two places"
        assert len(self._slots) <= self.num_slots
