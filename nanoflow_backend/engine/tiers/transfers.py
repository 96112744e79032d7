"""TierTransfers carries out one rank's transfers between the tiers of its KV cache, and reports what came of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from nanoflow_backend.kvcache.disk.disk_store import DiskStore
from nanoflow_backend.kvcache.host_pool import HostPool
from nanoflow_backend.kvcache.tier import Move, Transfer, TransferReport
from nanoflow_backend.runtime.page_copies import PageCopies, PageCopy

LONGEST_WAIT_S = 2e-3  # of a step that has nothing else to do: new requests are taken in between
POLL_S = 1e-4


class DiskMoves(Protocol):
    """Reads and writes of the disk, on threads of their own."""

    def write(self, ticket: int, content: bytes, payload: memoryview, parent: bytes) -> bool:
        """Begin to write. The payload stays as it is until the ticket comes back. False: there is no room for more."""
        ...

    def read(self, ticket: int, content: bytes, payload: memoryview) -> bool:
        """Begin to read into the payload. False: there is no room for more."""
        ...

    def poll(self) -> Sequence[tuple[int, bool]]:
        """Tickets that have come back since the last call, and whether they were done."""
        ...

    def close(self) -> bool:
        """End the threads. False: one of them does not answer, and its payload has to stay where it is."""
        ...


class _Copying(NamedTuple):
    """Transfers that were begun together."""

    ids: list[int]
    move: Move
    copy: PageCopy


class TierTransfers:
    """For one thread. Nothing but `report` with `wait` waits for anything, and that not for long.

    Args:
        copies: between the device and `pool`.
        disk: None: there will be no READ and no WRITE.
        store: what `disk` reads and writes.

    Attributes:
        copies: may be replaced while nothing is on its way, as to measure another way.
    """

    def __init__(
        self, copies: PageCopies, pool: HostPool, disk: DiskMoves | None = None, store: DiskStore | None = None
    ) -> None:
        self.pool, self.store = pool, store
        self.copies, self._disk = copies, disk
        self._copying: list[_Copying] = []
        self._moving: dict[int, tuple[Move, float]] = {}  # of the disk: since when
        self._last_end_s = dict.fromkeys(Move, 0.0)
        self._refused: list[int] = []  # that could not even begin

    def begin(self, transfers: Iterable[Transfer], after: torch.cuda.Event | None = None) -> None:
        """Begin transfers once the device has come to `after`.

        Raises:
            ValueError: a move of the disk, and there is none.
        """
        by_move: dict[Move, list[Transfer]] = {move: [] for move in Move}
        for transfer in transfers:
            by_move[transfer.move].append(transfer)
        for move in (Move.STORE, Move.LOAD):
            if listed := by_move[move]:
                pages, slots = [t.page for t in listed], [t.slot for t in listed]
                copy = self.copies.begin(pages, slots, to_host=move is Move.STORE, after=after)
                self._copying.append(_Copying([t.id for t in listed], move, copy))
        for transfer in (*by_move[Move.WRITE], *by_move[Move.READ]):
            self._begin_on_disk(transfer)

    def report(self, *, wait: bool = False) -> TransferReport:
        """What has ended since the last report. With `wait`, a moment is given to the first, if none has."""
        deadline_s = time.monotonic() + LONGEST_WAIT_S
        report = self._poll()
        while wait and not report.done and not report.failed and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
            report = self._poll()
        return report

    def close(self) -> None:
        """Wait for what is on its way, and give host memory back."""
        while self._copying:
            self._poll_copies([], [0.0] * len(Move))
            time.sleep(POLL_S)
        if self._disk is None or self._disk.close():
            self.pool.close()
        if self.store is not None:
            self.store.close()

    def _begin_on_disk(self, transfer: Transfer) -> None:
        if self._disk is None:
            raise ValueError(f"transfers: expected none of the disk, as there is none, got {transfer}")
        payload = self.pool.view(transfer.slot)
        if transfer.move is Move.WRITE:
            begun = self._disk.write(transfer.id, transfer.content, payload, transfer.parent)
        else:
            begun = self._disk.read(transfer.id, transfer.content, payload)
        if begun:
            self._moving[transfer.id] = transfer.move, time.perf_counter()
        else:
            self._refused.append(transfer.id)

    def _poll(self) -> TransferReport:
        done: list[int] = []
        seconds = [0.0] * len(Move)
        self._poll_copies(done, seconds)
        failed, self._refused = self._refused, []
        for ticket, kept in self._disk.poll() if self._disk else ():
            move, begun_s = self._moving.pop(ticket)
            now_s = time.perf_counter()
            seconds[move] += now_s - max(begun_s, self._last_end_s[move])  # several at once share the disk
            self._last_end_s[move] = now_s
            (done if kept else failed).append(ticket)
        return TransferReport(done, failed, self.pool.ready, tuple(seconds))

    def _poll_copies(self, done: list[int], seconds: list[float]) -> None:
        coming: list[_Copying] = []
        for copying in self._copying:
            took_s = copying.copy.seconds()
            if took_s is None:
                coming.append(copying)
            else:
                done += copying.ids
                seconds[copying.move] += took_s
        self._copying = coming
