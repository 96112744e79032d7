"""Tier: the device and host memory, by the same rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nanoflow_backend.kvcache.device_tier import DeviceTier
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.tier import Tier, leading_slots

CONTENTS = [bytes([i]) * 32 for i in range(40)]


def device() -> tuple[Tier, Callable[[bytes], int]]:
    tier = DeviceTier(8)

    def keep(content: bytes) -> int:
        (page,) = tier.pool.allocate(1)
        tier.store(content, page)
        return page

    return tier, keep


def host() -> tuple[Tier, Callable[[bytes], int]]:
    tier = HostTier()
    tier.grow(8)

    def keep(content: bytes) -> int:
        slot = tier.reserve(content, None)
        assert slot is not None
        tier.commit(content)
        return slot

    return tier, keep


@pytest.mark.parametrize("make", [device, host])
def test_what_is_kept_is_found_up_to_the_first_that_is_not(make: Callable) -> None:
    tier, keep = make()
    places = [keep(content) for content in (CONTENTS[0], CONTENTS[1], CONTENTS[3])]
    tier.check()
    assert leading_slots(tier, CONTENTS) == places[:2]
    assert len(set(places)) == 3
    assert tier.lookup(CONTENTS[2]) is None


def test_the_devices_pages_are_shared_and_leave_with_their_content() -> None:
    tier = DeviceTier(2)
    (page,) = tier.pool.allocate(1)
    tier.store(CONTENTS[0], page)
    tier.load(CONTENTS[0], page)
    assert tier.pool.references[page] == 2
    with pytest.raises(KeyError, match="does not hold this content"):
        tier.load(CONTENTS[0], 1 - page)
    tier.pool.release([page])
    tier.pool.release([page])
    tier.check()
    assert (tier.lookup(CONTENTS[0]), tier.holds(page)) == (page, True)
    assert page in tier.pool.allocate(2)
    assert (tier.lookup(CONTENTS[0]), tier.holds(page)) == (None, False)
    tier.check()


def test_content_that_is_stored_twice_stays_where_it_was() -> None:
    tier = DeviceTier(2)
    first, second = tier.pool.allocate(2)
    tier.store(CONTENTS[0], first)
    tier.store(CONTENTS[0], second)
    assert (tier.lookup(CONTENTS[0]), tier.holds(second)) == (first, False)
    tier.check()
