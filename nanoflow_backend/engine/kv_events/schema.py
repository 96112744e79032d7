"""encode_batch writes page events as gateways read them from vLLM: msgpack, by position, the event's name first.

By position, for every gateway reads that; the maps of vLLM 0.26 only newer ones do. Hashes are the last 8 bytes of
ours as an unsigned integer, which is what vLLM makes of its own: gateways reduce longer ones, each in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import msgspec

from nanoflow_backend.kvcache.page_events import Cleared, PageEvent, Removed, Stored

HASH_BYTES = 8


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Pages of consecutive tokens. A gateway hashes `token_ids` in its own way, after those of the parent."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]  # of all blocks; none where nobody knows them
    block_size: int  # tokens of a block; 0 without tokens
    lora_id: None
    medium: str
    lora_name: None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True):
    block_hashes: list[int]
    medium: str


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


class EventBatch(msgspec.Struct, frozen=True, array_like=True):
    """What happened in a step, in its order."""

    ts: float  # of time.time()
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int


_encoder = msgspec.msgpack.Encoder()


def encode_batch(ts: float, events: Sequence[PageEvent], data_parallel_rank: int) -> bytes:
    """The payload of a message."""
    return _encoder.encode(EventBatch(ts, [_translated(event) for event in events], data_parallel_rank))


def block_hash(content: bytes) -> int:
    """What gateways know a page by."""
    return int.from_bytes(content[-HASH_BYTES:], "big")


def _translated(event: PageEvent) -> BlockStored | BlockRemoved | AllBlocksCleared:
    match event:
        case Stored(contents, parent, token_ids, medium):
            return BlockStored(
                block_hashes=[block_hash(content) for content in contents],
                parent_block_hash=None if parent is None else block_hash(parent),
                token_ids=list(chain.from_iterable(token_ids)),
                block_size=len(token_ids[0]) if token_ids else 0,
                lora_id=None,
                medium=medium,
                lora_name=None,
            )
        case Removed(contents, medium):
            return BlockRemoved([block_hash(content) for content in contents], medium)
        case Cleared():
            return AllBlocksCleared()
