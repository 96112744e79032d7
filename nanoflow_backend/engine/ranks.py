"""Ranks starts the processes of a tensor-parallel group beside rank 0; `main` is what each of them runs.

Rank 0 lives in the engine process. The others get every batch that it launches and then the masks of its tail.
Sampling is deterministic, so all ranks draw the same ids, and say nothing of them; where there are tiers below the
device, they report after each step what has become of their transfers.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import timedelta

import msgspec
import torch.distributed as dist

from nanoflow_backend.engine.rank_reports import RankReports
from nanoflow_backend.engine.settle import Settled
from nanoflow_backend.engine.worker import Worker
from nanoflow_backend.kvcache.tier import TransferReport
from nanoflow_backend.process import logs
from nanoflow_backend.process.child import Child, ChildDied, Parent
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch


class StartRank(msgspec.Struct, frozen=True):
    """The first message to a rank. Then come, for each step, a Batch and its Masks (None: nothing is forbidden)."""

    settled: Settled
    rank: int
    rendezvous: str  # the file in which the group's members find each other


class RankReady(msgspec.Struct, frozen=True):
    """A rank can run, or cannot."""

    error: str | None = None
    transfers: TransferReport | None = None  # as in Sampled


class Ranks:
    """Ranks 1 .. tp - 1.

    When one dies, `on_death` is called from another thread, so that an idle engine knows too; a collective that waits
    for the rank fails.
    """

    def __init__(self, settled: Settled, on_death: Callable[[str], None]) -> None:
        size = settled.config.tensor_parallel
        self._folder = tempfile.TemporaryDirectory(prefix="nanoflow-ranks-")  # 0700
        rendezvous = os.path.join(self._folder.name, "rendezvous")
        self._on_death = on_death
        self._closing = False
        self._encoder = msgspec.msgpack.Encoder()
        self._children = [Child("nanoflow_backend.engine.ranks") for _ in range(1, size)]
        self._ready: list[Future[None]] = [Future() for _ in self._children]
        self._reports = RankReports(size)
        try:
            for rank, (child, ready) in enumerate(zip(self._children, self._ready, strict=True), start=1):
                threading.Thread(target=self._watch, args=(rank, child, ready), daemon=True).start()
                with contextlib.suppress(ChildDied):  # who watches it says so
                    child.send(StartRank(settled, rank, rendezvous))
            self._join(rendezvous, size)
        except Exception:
            self._end_children()
            raise

    def wait_until_ready(self) -> None:
        """Raises: RuntimeError, naming the rank and what it said."""
        for ready in self._ready:
            ready.result()

    def broadcast(self, message: Batch | Masks | None) -> None:
        """Send one message to every rank, each in order."""
        encoded = self._encoder.encode(message)
        for child in self._children:
            child.send_bytes(encoded)

    def join_reports(self, report: TransferReport) -> TransferReport:
        """What all ranks have moved since the last call, `report` being that of rank 0."""
        return self._reports.join(report)

    def close(self) -> None:
        self._end_children()
        dist.destroy_process_group()

    def _end_children(self) -> None:
        self._closing = True
        for child in self._children:
            child.close()  # its lifeline
            child.stop()
        self._folder.cleanup()

    def _join(self, rendezvous: str, size: int) -> None:
        """Join the group, unless a rank dies before it has: the others would wait ten minutes for it."""
        joined: Future[None] = Future()

        def join() -> None:
            try:
                join_group(rendezvous, 0, size)
                joined.set_result(None)
            except Exception as error:
                joined.set_exception(error)

        threading.Thread(target=join, name="join-group", daemon=True).start()
        while not joined.done():
            wait([joined, *(ready for ready in self._ready if not ready.done())], return_when=FIRST_COMPLETED)
            for ready in self._ready:
                if ready.done():
                    ready.result()
        joined.result()

    def _watch(self, rank: int, child: Child, ready: Future[None]) -> None:
        decoder = msgspec.msgpack.Decoder(RankReady)
        try:
            ready_to_run = child.receive(decoder)
            why = ready_to_run.error
            if why is None:
                if ready_to_run.transfers is not None:
                    self._reports.add(rank, ready_to_run.transfers)
                ready.set_result(None)
                reports = msgspec.msgpack.Decoder(TransferReport)
                while True:  # until the end
                    self._reports.add(rank, child.receive(reports))
        except ChildDied as death:
            why = str(death)
        if not ready.done():
            ready.set_exception(RuntimeError(f"rank {rank}: {why}"))
        if not self._closing:
            self._on_death(f"rank {rank}: {why}")


def join_group(rendezvous: str, rank: int, size: int) -> None:
    """All ranks are on this host: gloo talks over loopback."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))


def main() -> None:
    """A rank's process: launch what rank 0 launches, until it closes the socket."""
    logs.configure()
    parent = Parent()
    start: StartRank = parent.receive(msgspec.msgpack.Decoder(StartRank))
    try:
        join_group(start.rendezvous, start.rank, start.settled.config.tensor_parallel)
        worker = Worker(start.settled, start.rank)
    except Exception as error:
        parent.send(RankReady(f"{type(error).__name__}: {error}"))
        raise
    parent.send(RankReady(transfers=worker.report_transfers()))
    batches, masks = msgspec.msgpack.Decoder(Batch), msgspec.msgpack.Decoder(Masks | None)
    while True:
        step = worker.launch_forward(parent.receive(batches))
        worker.launch_tail(step, parent.receive(masks))
        if (report := worker.report_transfers(wait=not step.batch.tokens)) is not None:
            parent.send(report)


if __name__ == "__main__":
    main()
