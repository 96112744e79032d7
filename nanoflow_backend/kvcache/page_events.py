"""PageEvents records which full pages came into a tier and which left it: so prompts can be sent to where pages are."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import StrEnum

import msgspec


class Medium(StrEnum):
    """Where a tier keeps its pages, by the names that gateways know."""

    DEVICE = "GPU"
    HOST = "CPU"


@dataclass(slots=True)
class Stored:
    """Consecutive full pages of one prompt can be found in a tier from now on."""

    contents: list[bytes]  # hashes, see content_hash
    parent: bytes | None  # the content before the first of these; None: there is none
    token_ids: list[array[int]]  # of each of these pages, C ints; none at all: nobody has said what they hold
    medium: Medium


@dataclass(slots=True)
class Removed:
    """Pages cannot be found in a tier any more."""

    contents: list[bytes]
    medium: Medium


@dataclass(slots=True)
class Cleared:
    """No page can be found in any tier."""


PageEvent = Stored | Removed | Cleared


class _Description(msgspec.Struct, gc=False):
    """What a page holds, for as long as a tier has it. There may be many: the collector need not walk them."""

    parent: bytes | None = None
    token_ids: array[int] | None = None  # None: nobody has said
    tiers: int = 0  # that have the page


class PageEvents:
    """A list of what happened, in its order; one thread writes and takes it.

    Each tier says what it stores and removes, once. Only who computes a page knows its tokens: they are kept for the
    events of the other tiers, until none has the page any more.
    """

    def __init__(self) -> None:
        self._events: list[PageEvent] = []
        self._descriptions: dict[bytes, _Description] = {}

    def stored(self, content: bytes, parent: bytes | None, token_ids: array[int], medium: Medium) -> None:
        """A tier has a page that it did not have, and this is what the page holds: its tokens, and what is before."""
        description = self._description(content)
        description.parent, description.token_ids = parent, token_ids
        self._add(content, description, medium)

    def copied(self, content: bytes, medium: Medium) -> None:
        """A tier has a page that it did not have, as another tier has it, or as an earlier process left it behind."""
        self._add(content, self._description(content), medium)

    def removed(self, content: bytes, medium: Medium) -> None:
        """A tier does not have a page any more."""
        description = self._descriptions[content]
        description.tiers -= 1
        if not description.tiers:
            del self._descriptions[content]
        last = self._events[-1] if self._events else None
        if isinstance(last, Removed) and last.medium is medium:
            last.contents.append(content)
        else:
            self._events.append(Removed([content], medium))

    def cleared(self) -> None:
        """No tier has any page: so it is in the beginning, whatever an earlier process had."""
        self._events.append(Cleared())
        self._descriptions.clear()

    def take(self) -> list[PageEvent]:
        """What happened since the last call."""
        taken, self._events = self._events, []
        return taken

    def _description(self, content: bytes) -> _Description:
        description = self._descriptions.get(content)
        if description is None:
            description = self._descriptions[content] = _Description()
        return description

    def _add(self, content: bytes, description: _Description, medium: Medium) -> None:
        """Consecutive pages are one event."""
        description.tiers += 1
        parent, token_ids = description.parent, description.token_ids
        if token_ids is None:
            self._events.append(Stored([content], None, [], medium))
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, Stored) and last.medium is medium and last.contents[-1] == parent and last.token_ids:
            last.contents.append(content)
            last.token_ids.append(token_ids)
        else:
            self._events.append(Stored([content], parent, [token_ids], medium))
