"""Transfers numbers the moves of pages, knows which are on their way and what for, and counts those that have ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from nanoflow_backend.kvcache.tier import FIRST, Move, Transfer, TransferReport
from nanoflow_backend.scheduler.tiers.load_plan import LoadPlan


class Load(NamedTuple):
    """A page of a plan that is on its way to the device, or to host memory first."""

    plan: LoadPlan
    place: int  # in its sequence


class Outstanding(NamedTuple):
    """A transfer that has begun, of this content."""

    transfer: Transfer
    content: bytes
    load: Load | None = None  # what a LOAD is for


class Transfers:
    """Those of one scheduler.

    Attributes:
        on_their_way: how many, by move.
        moved, failed, busy_s: pages that were and were not moved, and the seconds that it took, by move.
    """

    def __init__(self) -> None:
        self.on_their_way = Counter[Move]()
        self.moved, self.failed = Counter[Move](), Counter[Move]()
        self.busy_s = [0.0] * len(Move)
        self._outstanding: dict[int, Outstanding] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._outstanding)

    def __iter__(self) -> Iterator[Outstanding]:
        return iter(self._outstanding.values())

    def begin(
        self,
        move: Move,
        slot: int,
        content: bytes,
        *,
        page: int = -1,
        parent: bytes | None = None,
        load: Load | None = None,
    ) -> Transfer:
        """`page` and `load`: of moves that have a page of the device; `parent`: of a WRITE."""
        self._last_id += 1
        self.on_their_way[move] += 1
        name = content if move in (Move.WRITE, Move.READ) else b""
        transfer = Transfer(self._last_id, move, slot, page, name, parent or FIRST)
        self._outstanding[transfer.id] = Outstanding(transfer, content, load)
        return transfer

    def end(self, report: TransferReport) -> tuple[list[Outstanding], list[Outstanding]]:
        """What was moved, and what was not. Raises: ValueError, a move that cannot fail has."""
        done = [self._outstanding.pop(id) for id in report.done]
        failed = [self._outstanding.pop(id) for id in report.failed]
        for ended, counts in ((done, self.moved), (failed, self.failed)):
            moves = Counter(each.transfer.move for each in ended)
            counts.update(moves)
            self.on_their_way.subtract(moves)
        if self.failed[Move.STORE] or self.failed[Move.LOAD]:
            raise ValueError(f"transfers: expected only moves of the disk to fail, got {failed}")
        self.busy_s = [before + now for before, now in zip(self.busy_s, report.seconds, strict=True)]
        return done, failed
