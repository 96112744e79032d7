"""Ranks joins rank 0 to the others of its tensor-parallel group; `main` is what each of those runs.

Rank 0 lives in the engine process. The others get every batch that it launches and then the masks of its tail: those of
this host over a socket pair each, those of another host over one link to it. Sampling is deterministic, so all ranks
draw the same ids, and say nothing of them; where there are tiers below the device, they report after each step what has
become of their transfers.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import msgspec
import torch.distributed as dist
from msgspec.structs import replace

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.tiers.rank_reports import RankReports
from nanoflow_backend.engine.worker import Worker
from nanoflow_backend.hosts.gathering import gather, listen_at
from nanoflow_backend.hosts.link import Link
from nanoflow_backend.hosts.members import Members, start_ranks
from nanoflow_backend.hosts.messages import Begin, Progress, RankReport, StartRank
from nanoflow_backend.hosts.rank_error import RankError
from nanoflow_backend.kvcache.tier import PageIndex, TransferReport
from nanoflow_backend.process import logs
from nanoflow_backend.process.channel import ChannelClosed
from nanoflow_backend.process.child import Parent
from nanoflow_backend.runtime.collectives.choice import open_collectives
from nanoflow_backend.runtime.collectives.group import (
    COLLECTIVE_TIMEOUT,
    INTERFACE,
    LOOPBACK,
    arrive,
    join_group,
    missing,
    open_store,
)
from nanoflow_backend.runtime.collectives.protocol import Collectives
from nanoflow_backend.runtime.rank_gpu import stay_near_gpu, take_gpu
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch

CONTENTS_A_MESSAGE = 10_000  # 320 KB
# Once all ranks are at the door. Those wait for rank 0 without a limit of their own: it ends them if it gives up.
MEETING_S = 10.0
CHECK_S = 0.02
EXPLAINED_S = 2.0


class Ranks:
    """Ranks 1 .. tp - 1, on this host and on others.

    When one dies, or the link to its host is lost, `on_death` is called from another thread, so that an idle engine
    knows too; a collective that waits for a rank that died fails, and the other ranks are ended.

    Attributes:
        collectives: of rank 0, to exchange rows with the others.

    Raises:
        ConfigError: where there are other hosts, see gather.
        RankError: a rank ended before all had met, with its number and what it said; or they did not meet.
    """

    def __init__(self, settled: Settled, on_death: Callable[[str], None]) -> None:
        config = settled.config
        self._on_death = on_death
        self.collectives: Collectives | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._folder = tempfile.TemporaryDirectory(prefix="nanoflow-ranks-")  # 0700
        rendezvous, interface = os.path.join(self._folder.name, "rendezvous"), LOOPBACK
        links: dict[str, Link] = {}
        with contextlib.ExitStack() as opened:
            listening = None
            if config.hosts > 1:
                address, interface, links = gather(settled)
                listening = opened.enter_context(listen_at(address))
                rendezvous = f"{address}:{listening.getsockname()[1]}"
            here = range(1, config.tensor_parallel // config.hosts)
            ranks = start_ranks(StartRank(settled, rank, rendezvous, interface) for rank in here)
            self._reports = RankReports(config.tensor_parallel)
            self._members = Members({**ranks, **links}, self._rank_died, self._reports.add)
            try:
                for link in links.values():
                    link.send(Begin(rendezvous))
                self._members.wait_until_started()
                self._meet(rendezvous, interface, config.tensor_parallel, listening)
                with self.errors_explained():
                    self.collectives = open_collectives(settled, interface)
            except Exception:
                self.close()
                raise

    def wait_until_ready(self) -> None:
        """Raises: RankError, naming the rank and what it said."""
        self._members.wait_until_ready()

    def broadcast(self, message: Batch | Masks | None) -> None:
        """Send one message to every rank, each in order."""
        self._members.broadcast(self._encoder.encode(message))

    @contextlib.contextmanager
    def errors_explained(self) -> Iterator[None]:
        """An error of what we compute together, as a collective has when a peer is gone, says who has ended, if any.

        The peers' connections end some moments before their own parents, and then we, hear of them.
        """
        try:
            yield
        except RuntimeError as error:
            if how := self._members.wait_for_death(EXPLAINED_S):
                raise RankError(how) from error
            raise

    def join_reports(self, report: TransferReport) -> TransferReport:
        """What all ranks have moved since the last call, `report` being that of rank 0."""
        return self._reports.join(report)

    def index_of_all(self, own: PageIndex) -> PageIndex:
        """What the disks of all ranks have, `own` being that of rank 0."""
        return self._reports.index(own)

    def check(self) -> None:
        """Raises: RankError, a rank has ended, and what was exchanged since then means nothing."""
        if how := self._members.wait_for_death(0):
            raise RankError(how)

    def close(self) -> None:
        """End them all, and the group. Harmless when repeated."""
        self._members.close()
        if self.collectives:
            self.collectives.abort()  # a step may be in flight, and wait for the others
            self.collectives.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()

    def _rank_died(self, how: str) -> None:
        """On a thread that watches it. Kernels of rank 0 may wait for it; nobody else can end them."""
        if self.collectives:
            self.collectives.abort()
        self._on_death(how)

    def _meet(self, rendezvous: str, interface: str, size: int, listening: socket.socket | None) -> None:
        limit = timedelta(seconds=MEETING_S)
        try:
            store = open_store(rendezvous, size, limit, listening)
            arrive(store, 0)
            began_s = time.monotonic()
            while late := missing(store, size):
                self.check()
                if time.monotonic() - began_s >= MEETING_S:
                    names = ", ".join(f"rank {rank}" for rank in late)
                    raise RankError(f"{names}: started, but did not come to the meeting of all {size} ranks")
                time.sleep(CHECK_S)
            join_group(store, 0, size, interface, limit)
        except RuntimeError as error:  # ours, or of torch
            if how := self._members.wait_for_death(EXPLAINED_S):
                raise RankError(how) from error
            raise RankError(
                f"the {size} ranks did not meet within {MEETING_S:g} s over the interface {interface} "
                f"({INTERFACE} chooses another); each must reach the others on any port: {error}"
            ) from error


def main() -> None:
    """A rank's process: launch what rank 0 launches, until it closes the socket."""
    logs.configure()
    parent = Parent()
    start: StartRank = parent.receive(msgspec.msgpack.Decoder(StartRank))
    try:
        if start.settled.config.device == "cuda":
            take_gpu(start.settled.config, start.rank)
            stay_near_gpu(start.rank)
        parent.send(Progress())  # at the door: torch is there, and the GPU's driver, which may take long to begin
        worker = _join(start, parent)
    except Exception as error:
        parent.send(Progress(f"{type(error).__name__}: {error}"))
        raise
    if (report := worker.report_transfers()) is not None:
        parent.send(RankReport(start.rank, report))
    if worker.page_store is not None:
        worker.page_store.watch(partial(tell_of_pages, parent, start.rank))
    parent.send(Progress())
    batches, masks = msgspec.msgpack.Decoder(Batch), msgspec.msgpack.Decoder(Masks | None)
    while True:
        step = worker.launch_forward(parent.receive(batches))
        worker.launch_tail(step, parent.receive(masks))
        if (report := worker.report_transfers(wait=not step.batch.tokens)) is not None:
            if worker.page_store is not None and (report.done or report.failed):
                report = replace(report, disk=worker.page_store.stats)
            parent.send(RankReport(start.rank, report))


def _join(start: StartRank, parent: Parent) -> Worker:
    """Meet the others, and load the weights."""
    ranks = start.settled.config.tensor_parallel
    store = open_store(start.rendezvous, ranks, COLLECTIVE_TIMEOUT)
    arrive(store, start.rank)
    join_group(store, start.rank, ranks, start.interface)
    collectives = open_collectives(start.settled, start.interface)
    parent.on_end = collectives.abort
    return Worker(start.settled, start.rank, collectives)


def tell_of_pages(parent: Parent, rank: int, found: list[bytes], gone: list[bytes]) -> None:
    """What a rank's disk has, and no longer has, is told as it happens: an idle engine takes no step."""
    with contextlib.suppress(ChannelClosed):  # the leader is gone, and this process about to end
        for first in range(0, max(len(found), 1), CONTENTS_A_MESSAGE):
            part = found[first : first + CONTENTS_A_MESSAGE]
            parent.send(RankReport(rank, TransferReport(found=part, gone=gone if first == 0 else [])))


if __name__ == "__main__":
    main()
