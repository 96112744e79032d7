"""HostTier: who goes first, against a plain list; what is on its way or pinned stays."""

from __future__ import annotations

import random

import pytest

from nanoflow_backend.kvcache.host_tier import HostTier


def made(num_slots: int, *chains: str) -> HostTier:
    """A tier that was given these chains in turn; each letter is a content, and follows the one before."""
    tier = HostTier()
    tier.grow(num_slots)
    for chain in chains:
        for index in range(len(chain)):
            keep(tier, chain[index], chain[index - 1] if index else None)
    return tier


def keep(tier: HostTier, content: str, parent: str | None = None) -> int | None:
    name = content.encode()
    if tier.knows(name):
        tier.touch(name)
        return tier.lookup(name)
    slot = tier.reserve(name, parent.encode() if parent else None)
    tier.check()
    if slot is not None:
        tier.commit(name)
        tier.check()
    return slot


def held(tier: HostTier, contents: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    return "".join(c for c in contents if tier.lookup(c.encode()) is not None)


def test_a_chain_goes_from_its_end_though_its_beginning_was_used_least_recently() -> None:
    tier = made(4, "abcd")
    for number, left in enumerate(("abc", "ab", "a", "")):
        keep(tier, "wxyz"[number])
        assert held(tier, "abcd") == left
    assert tier.evicted == 4


def test_the_least_recently_used_leaf_goes_first() -> None:
    tier = made(5, "ab", "ac", "de")
    tier.touch(b"b")
    keep(tier, "x")
    assert held(tier) == "abdex", "c was used before e, and b since"
    keep(tier, "y")
    assert held(tier) == "abdxy"
    tier.touch(b"d")
    keep(tier, "z")
    assert held(tier) == "adxyz", "b's last use came before x's"


def test_what_is_on_its_way_is_not_found_and_does_not_go() -> None:
    tier = made(2, "a")
    assert tier.reserve(b"b", b"a") is not None
    assert (tier.lookup(b"b"), tier.knows(b"b")) == (None, True)
    assert tier.reserve(b"c", None) is None, "b is on its way, and a is before it"
    tier.abandon(b"b")
    tier.check()
    assert not tier.knows(b"b")
    assert keep(tier, "c") is not None
    assert held(tier) == "ac"


def test_what_is_pinned_stays_until_it_is_unpinned_as_often() -> None:
    tier = made(2, "a", "b")
    assert tier.pin(b"a") == tier.pin(b"a") == tier.lookup(b"a")
    assert keep(tier, "c") is not None
    assert held(tier) == "ac"
    tier.pin(b"c")
    tier.unpin(b"a")
    assert keep(tier, "d") is None
    tier.unpin(b"a")
    assert keep(tier, "d") is not None
    assert held(tier) == "cd"


def test_slots_come_later_and_none_before() -> None:
    tier = HostTier()
    assert tier.reserve(b"a", None) is None
    tier.grow(1)
    tier.grow(1)
    tier.grow(3)
    tier.check()
    assert sorted(str(keep(tier, content)) for content in "abc") == ["0", "1", "2"]


def test_content_without_its_parent_goes_by_its_own_use() -> None:
    """As when pages come from the disk from the back of a chain."""
    tier = HostTier()
    tier.grow(2)
    keep(tier, "c", "b")
    keep(tier, "b", "a")
    keep(tier, "x")
    assert held(tier) == "bx", "c is the end, whether b came before it or not"


class PlainTier:
    """The rules of HostTier in a list, least recently used first."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.entries: list[tuple[str, str | None]] = []
        self.pinned: list[str] = []

    def use(self, content: str) -> None:
        self.entries.sort(key=lambda entry: entry[0] == content)

    def keep(self, content: str, parent: str | None) -> bool:
        if content not in dict(self.entries):
            parents = {p for _, p in self.entries}
            free = [e for e in self.entries if e[0] not in parents and e[0] not in self.pinned]
            if len(self.entries) == self.num_slots:
                if not free:
                    return False
                self.entries.remove(free[0])
            self.entries.append((content, parent))
        self.use(content)
        return True


@pytest.mark.parametrize("seed", range(20))
def test_random_histories_hold_what_a_plain_list_holds(seed: int) -> None:
    rng = random.Random(seed)
    num_slots = rng.randint(1, 9)
    tier, plain = made(num_slots), PlainTier(num_slots)
    parents: dict[str, str | None] = {}
    for _ in range(400):
        content = rng.choice("abcdefghijklmnop")
        action = rng.random()
        if action < 0.6:
            parent = parents.setdefault(content, rng.choice([None, *parents]))
            assert (keep(tier, content, parent) is not None) == plain.keep(content, parent)
        elif action < 0.8:
            tier.touch(content.encode())
            plain.use(content)
        elif action < 0.9 and tier.knows(content.encode()):
            tier.pin(content.encode())
            plain.pinned.append(content)
            plain.use(content)
        elif plain.pinned:
            content = plain.pinned.pop(rng.randrange(len(plain.pinned)))
            tier.unpin(content.encode())
        tier.check()
        assert held(tier) == "".join(sorted(dict(plain.entries)))
    assert tier.evicted > 50
