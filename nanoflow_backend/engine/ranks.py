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
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import msgspec
import torch.distributed as dist
from msgspec.structs import replace
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.tiers.rank_reports import RankReports
from nanoflow_backend.engine.worker import Worker
from nanoflow_backend.hosts.gathering import gather, listen_at
from nanoflow_backend.hosts.link import Link
from nanoflow_backend.hosts.members import Members, start_ranks
from nanoflow_backend.hosts.messages import Begin, Progress, RankReport, StartRank
from nanoflow_backend.kvcache.tier import PageIndex, TransferReport
from nanoflow_backend.process import logs
from nanoflow_backend.process.channel import ChannelClosed
from nanoflow_backend.process.child import Parent
from nanoflow_backend.sampling.constraints import Masks
from nanoflow_backend.scheduler.batch import Batch

CONTENTS_A_MESSAGE = 10_000  # 320 KB
LOOPBACK = "lo"
INTERFACE = "GLOO_SOCKET_IFNAME"
# Once all ranks are at the door. Those wait for rank 0 without a limit of their own: it ends them if it gives up.
MEETING_S = 10.0
EXPLAINED_S = 2.0
# A rank that dies closes its connections, which the others notice at once; of a lost link the rank channel hears.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


class Ranks:
    """Ranks 1 .. tp - 1, on this host and on others.

    When one dies, or the link to its host is lost, `on_death` is called from another thread, so that an idle engine
    knows too; a collective that waits for a rank that died fails.

    Raises:
        ConfigError: where there are other hosts, see gather.
        RuntimeError: a rank ended before all had met, with its number and what it said; or they did not meet.
    """

    def __init__(self, settled: Settled, on_death: Callable[[str], None]) -> None:
        config = settled.config
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
            self._members = Members({**ranks, **links}, on_death, self._reports.add)
            try:
                for link in links.values():
                    link.send(Begin(rendezvous))
                self._members.wait_until_started()
                self._meet(rendezvous, interface, config.tensor_parallel, listening)
            except Exception:
                self.close()
                raise

    def wait_until_ready(self) -> None:
        """Raises: RuntimeError, naming the rank and what it said."""
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
                raise RuntimeError(how) from error
            raise

    def join_reports(self, report: TransferReport) -> TransferReport:
        """What all ranks have moved since the last call, `report` being that of rank 0."""
        return self._reports.join(report)

    def index_of_all(self, own: PageIndex) -> PageIndex:
        """What the disks of all ranks have, `own` being that of rank 0."""
        return self._reports.index(own)

    def close(self) -> None:
        self._members.close()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._folder.cleanup()

    def _meet(self, rendezvous: str, interface: str, size: int, listening: socket.socket | None) -> None:
        try:
            join_group(rendezvous, 0, size, interface, timedelta(seconds=MEETING_S), listening)
        except RuntimeError as error:  # of torch
            if how := self._members.wait_for_death(EXPLAINED_S):
                raise RuntimeError(how) from error
            raise RuntimeError(
                f"the {size} ranks did not meet within {MEETING_S:g} s over the interface {interface} "
                f"({INTERFACE} chooses another); each must reach the others on any port: {error}"
            ) from error


def join_group(
    rendezvous: str,
    rank: int,
    size: int,
    interface: str,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    listening: socket.socket | None = None,
) -> None:
    """Make the default process group, of gloo.

    Args:
        rendezvous: a file, or HOST:PORT, where rank 0 listens.
        interface: what gloo talks over, unless GLOO_SOCKET_IFNAME names another.
        timeout: until all have met.
        listening: rank 0's socket at HOST:PORT.
    """
    store: Any
    if rendezvous.startswith("/"):
        store = dist.FileStore(rendezvous, size)  # type: ignore[attr-defined]
    else:
        host, _, port = rendezvous.rpartition(":")
        fd = None if listening is None else os.dup(listening.fileno())  # the store closes it
        store = dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), size, fd is not None, timeout, wait_for_workers=False, master_listen_fd=fd
        )
    _world.group_count = 0  # a group has it in its name, which all ranks must know; torch counts failures, too
    with talking_over(interface):
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    _set_pg_timeout(COLLECTIVE_TIMEOUT)


@contextlib.contextmanager
def talking_over(interface: str) -> Iterator[None]:
    """Gloo knows it from the environment alone. It is put back: the next group may be another."""
    if os.environ.get(INTERFACE):
        yield
        return
    os.environ[INTERFACE] = interface
    try:
        yield
    finally:
        del os.environ[INTERFACE]


def main() -> None:
    """A rank's process: launch what rank 0 launches, until it closes the socket."""
    logs.configure()
    parent = Parent()
    start: StartRank = parent.receive(msgspec.msgpack.Decoder(StartRank))
    parent.send(Progress())  # at the door: torch is there
    try:
        join_group(start.rendezvous, start.rank, start.settled.config.tensor_parallel, start.interface)
        worker = Worker(start.settled, start.rank)
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


def tell_of_pages(parent: Parent, rank: int, found: list[bytes], gone: list[bytes]) -> None:
    """What a rank's disk has, and no longer has, is told as it happens: an idle engine takes no step."""
    with contextlib.suppress(ChannelClosed):  # the leader is gone, and this process about to end
        for first in range(0, max(len(found), 1), CONTENTS_A_MESSAGE):
            part = found[first : first + CONTENTS_A_MESSAGE]
            parent.send(RankReport(rank, TransferReport(found=part, gone=gone if first == 0 else [])))


if __name__ == "__main__":
    main()
