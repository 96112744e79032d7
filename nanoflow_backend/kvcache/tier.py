"""A Tier keeps full pages by their content hash (device, host memory, disk); it decides in ints.

The scheduler decides which pages move, the worker copies them. A tier below the device numbers its places (slots) as
the device numbers its pages; what has to be copied is said by Transfers, which travel in the batch of a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import Protocol

import msgspec


class Direction(IntEnum):
    """Which way a page goes between the device and the tier below it."""

    STORE = 0  # from the device's page to the tier's slot
    LOAD = 1  # from the tier's slot to the device's page


class Transfer(msgspec.Struct, frozen=True, array_like=True):
    """One page to be copied between the device and a tier below it.

    The transfers of a batch take effect in their order, before the rows of the batch are computed, and after those of
    earlier batches. A store is done then; a load is only certain to be done when the batch has come back.
    """

    page: int
    tier_slot: int
    direction: Direction


class Tier(Protocol):
    """Who calls `store` and `load` sees to it that a Transfer that they return is carried out, in that order.

    A tier may drop content whenever it stores other content; nothing that it has returned is affected, for transfers
    keep their order.
    """

    def lookup(self, content: bytes) -> int | None:
        """The slot that holds this content; None if the tier does not have it."""
        ...

    def store(self, content: bytes, page: int) -> Transfer | None:
        """Keep the content that the device's `page` holds now. None: nothing has to be copied.

        `content` is its hash. A tier that has no room for it, or has it already, may leave it.
        """
        ...

    def load(self, content: bytes, page: int) -> Transfer | None:
        """Bring content that `lookup` finds into the device's `page`. None: it lies there already.

        Raises:
            KeyError: the tier does not have it.
        """
        ...

    def check(self) -> None:
        """Raise AssertionError if content is lost, or in two places."""
        ...


def leading_slots(tier: Tier, contents: Iterable[bytes]) -> list[int]:
    """The slots of the leading contents, up to the first that the tier does not have."""
    slots = []
    for content in contents:
        slot = tier.lookup(content)
        if slot is None:
            break
        slots.append(slot)
    return slots
