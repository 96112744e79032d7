"""Gateway hears of a scheduler's pages by messages alone, and is compared with what the scheduler has."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from support.engine.page_map import Description, PageMap

from nanoflow_backend.engine.kv_events.schema import encode_batch
from nanoflow_backend.kvcache.page_events import PageEvents


class Gateway:
    """Give `events` to the scheduler."""

    def __init__(self, page_tokens: int) -> None:
        self.events = PageEvents()
        self._page_tokens = page_tokens
        self._map = PageMap()
        self._truth: dict[bytes, tuple[int, Description]] = {}  # by our hash: what a gateway should have

    def may_hear_of(self, tokens: list[int]) -> None:
        """A sequence will have these tokens, as far as it comes."""
        before, parent = b"", None
        for end in range(self._page_tokens, len(tokens) + 1, self._page_tokens):
            own = tokens[end - self._page_tokens : end]
            before = blake2b(before + b"".join(token.to_bytes(4, "little") for token in own), digest_size=32).digest()
            known_as = int.from_bytes(before[-8:], "big")
            self._truth[before] = known_as, (parent, tuple(own))
            parent = known_as

    def follow(self, device: Iterable[bytes], host: Iterable[bytes]) -> list[str]:
        """Read what there is to read. The pages of these tiers, by our hashes, and no others must be known then.

        Returns the names of the events.
        """
        events = self.events.take()
        names = self._map.take(encode_batch(0.0, events, 0)) if events else []
        truth = {medium: dict(self._truth[c] for c in has) for medium, has in (("GPU", device), ("CPU", host))}
        assert self._map.blocks.get("GPU", {}) == truth["GPU"]
        known = self._map.blocks.get("CPU", {})
        assert known.keys() == truth["CPU"].keys()
        for block, description in known.items():  # what comes from the disk may be there before anyone knows its tokens
            assert description in (truth["CPU"][block], (None, ()))
        return names
