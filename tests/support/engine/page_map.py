"""PageMap is what a gateway knows of an engine's KV pages: made of the bytes of its messages, by their positions alone.

It shares no code with what writes them. Rules of the gateways that read vLLM's events: an event is an array whose first
element is its name; fields that come later than those read here are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

Description = tuple[int | None, tuple[int, ...]]  # the block before, and the tokens


@dataclass
class PageMap:
    """By medium, blocks by their hash."""

    blocks: dict[str, dict[int, Description]] = field(default_factory=dict)
    rank: int | None = None

    def take(self, payload: bytes) -> list[str]:
        """Apply a message; the names of its events."""
        ts, events, rank, *_ = msgspec.msgpack.decode(payload)
        assert type(ts) is float
        assert type(rank) is int
        self.rank = rank
        for event in events:
            getattr(self, event[0])(*event[1:])
        return [event[0] for event in events]

    def BlockStored(
        self, hashes: list[int], parent: int | None, token_ids: list[int], size: int, lora: Any, medium: str, *_: Any
    ) -> None:
        assert lora is None
        assert len(token_ids) == len(hashes) * size
        assert all(type(value) is int and 0 <= value < 2**64 for value in hashes)
        for number, block in enumerate(hashes):
            held = self.blocks.setdefault(medium, {})
            assert block not in held, "a block is stored twice"
            held[block] = parent, tuple(token_ids[number * size : (number + 1) * size])
            parent = block

    def BlockRemoved(self, hashes: list[int], medium: str, *_: Any) -> None:
        for block in hashes:
            del self.blocks[medium][block]

    def AllBlocksCleared(self) -> None:
        self.blocks.clear()
