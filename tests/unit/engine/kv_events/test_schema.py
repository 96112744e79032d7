"""The bytes of kv_events, by the positions and types that gateways read."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec

from nanoflow_backend.engine.kv_events.schema import encode_batch
from nanoflow_backend.kvcache.page_events import Cleared, Medium, PageEvent, Removed, Stored


def content(number: int) -> bytes:
    return b"\xab" * 24 + number.to_bytes(8, "big")


EVENTS: list[PageEvent] = [
    Cleared(),
    Stored([content(7), content(2**64 - 1)], None, [array("i", [1, 2]), array("i", [3, 70_000])], Medium.DEVICE),
    Stored([content(8)], content(7), [array("i", [5, 6])], Medium.HOST),
    Stored([content(9)], None, [], Medium.HOST),
    Removed([content(8), content(7)], Medium.DEVICE),
]


def test_events_are_arrays_with_their_name_first() -> None:
    assert msgspec.msgpack.decode(encode_batch(1.5, EVENTS, 3)) == [
        1.5,
        [
            ["AllBlocksCleared"],
            ["BlockStored", [7, 2**64 - 1], None, [1, 2, 3, 70_000], 2, None, "GPU", None],
            ["BlockStored", [8], 7, [5, 6], 2, None, "CPU", None],
            ["BlockStored", [9], None, [], 0, None, "CPU", None],
            ["BlockRemoved", [8, 7], "GPU"],
        ],
        3,
    ]


class Stored_(msgspec.Struct, array_like=True, tag="BlockStored"):
    """As vLLM's examples of subscribers have declared it, before they read maps."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None


class Removed_(msgspec.Struct, array_like=True, tag="BlockRemoved"):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class Cleared_(msgspec.Struct, array_like=True, tag="AllBlocksCleared"):
    pass


class Batch(msgspec.Struct, array_like=True):
    ts: float
    events: list[Stored_ | Removed_ | Cleared_]
    data_parallel_rank: int | None = None


def test_a_subscriber_with_structs_of_positions_reads_them() -> None:
    batch = msgspec.msgpack.decode(encode_batch(1.0, EVENTS, 0), type=Batch)
    assert batch.events == [
        Cleared_(),
        Stored_([7, 2**64 - 1], None, [1, 2, 3, 70_000], 2, None, "GPU", None),
        Stored_([8], 7, [5, 6], 2, None, "CPU", None),
        Stored_([9], None, [], 0, None, "CPU", None),
        Removed_([8, 7], "GPU"),
    ]
    assert batch.data_parallel_rank == 0


def test_a_time_is_a_float_and_a_rank_is_there() -> None:
    """Readers take the first for a double whatever it is, and the third for an integer, 0 too."""
    payload = encode_batch(1_800_000_000.0, [Cleared()], 0)
    assert payload[:2] == b"\x93\xcb"
    assert payload[-1:] == b"\x00"
