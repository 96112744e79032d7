"""Tier: the device and a tier below it, by the same rules."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.scheduler.host_tier import HostTier

from nanoflow_backend.kvcache.device_tier import DeviceTier
from nanoflow_backend.kvcache.tier import Direction, Tier, Transfer, leading_slots

CONTENTS = [bytes([i]) * 32 for i in range(40)]


def device() -> tuple[Tier, Callable[[], int]]:
    tier = DeviceTier(8, lambda content, page: None)
    return tier, lambda: tier.pool.allocate(1)[0]


def host() -> tuple[Tier, Callable[[], int]]:
    pages = iter(range(100, 200))
    return HostTier(8), lambda: next(pages)


@pytest.mark.parametrize("make", [device, host])
def test_what_is_stored_is_found_up_to_the_first_that_is_not(make: Callable) -> None:
    tier, page = make()
    for content in (CONTENTS[0], CONTENTS[1], CONTENTS[3]):
        tier.store(content, page())
    tier.check()
    slots = leading_slots(tier, CONTENTS)
    assert slots == [tier.lookup(CONTENTS[0]), tier.lookup(CONTENTS[1])]
    assert len(set(slots)) == 2
    assert tier.lookup(CONTENTS[2]) is None
    with pytest.raises(KeyError):
        tier.load(CONTENTS[2], 0)


@pytest.mark.parametrize("make", [device, host])
def test_content_that_is_there_already_is_not_copied_again(make: Callable) -> None:
    tier, page = make()
    tier.store(CONTENTS[0], page())
    slot = tier.lookup(CONTENTS[0])
    assert tier.store(CONTENTS[0], page()) is None
    assert tier.lookup(CONTENTS[0]) == slot
    tier.check()


def test_a_tier_below_says_what_is_to_be_copied() -> None:
    tier = HostTier(2)
    assert [tier.store(CONTENTS[i], 10 + i) for i in range(2)] == [
        Transfer(10, 0, Direction.STORE),
        Transfer(11, 1, Direction.STORE),
    ]
    assert tier.load(CONTENTS[0], 7) == Transfer(7, 0, Direction.LOAD)
    assert tier.store(CONTENTS[2], 12) == Transfer(12, 1, Direction.STORE)  # of the least recently used
    assert [tier.lookup(content) for content in CONTENTS[:3]] == [0, None, 1]
    tier.check()


def test_the_devices_pages_are_shared_and_leave_with_their_content() -> None:
    evicted: list[tuple[bytes, int]] = []
    tier = DeviceTier(2, lambda content, page: evicted.append((content, page)))
    (page,) = tier.pool.allocate(1)
    assert tier.store(CONTENTS[0], page) is None
    assert tier.load(CONTENTS[0], page) is None
    assert tier.pool.references[page] == 2
    with pytest.raises(KeyError, match="does not hold this content"):
        tier.load(CONTENTS[0], 1 - page)
    tier.pool.release([page])
    tier.pool.release([page])
    tier.check()
    assert (tier.lookup(CONTENTS[0]), tier.holds(page), evicted) == (page, True, [])
    assert page in tier.pool.allocate(2)
    assert (tier.lookup(CONTENTS[0]), tier.holds(page), evicted) == (None, False, [(CONTENTS[0], page)])
    tier.check()


def test_random_histories_of_a_tier_below_lose_no_slot() -> None:
    rng = random.Random(5)
    for num_slots in (0, 1, 3, 8):
        tier, held = HostTier(num_slots), dict[int, bytes]()
        for _ in range(500):
            content = rng.choice(CONTENTS[:12])
            slot = tier.lookup(content)
            if slot is None:
                made = tier.store(content, 0)
                if made:
                    held[made.tier_slot] = content
            else:
                assert held[slot] == content
                assert tier.load(content, 3).tier_slot == slot
            tier.check()
        assert (tier.stores > 0) == (num_slots > 0)
