"""Members are those to whom every message goes: ranks of this host, and other hosts, each over a Channel."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait

import msgspec

from nanoflow_backend.hosts.messages import Progress, RankReport, StartRank
from nanoflow_backend.hosts.rank_error import RankError
from nanoflow_backend.kvcache.tier import TransferReport
from nanoflow_backend.process.channel import Channel, ChannelClosed
from nanoflow_backend.process.child import Child

log = logging.getLogger(__name__)
SAID_EVERY_S = 10.0
RANK = "nanoflow_backend.engine.ranks"  # what a rank's process runs


class Members:
    """The channels by name: "rank 1", "host 2 (10.0.0.2, ranks 4 to 7)". When one has ended, the others are ended, too.

    Args:
        on_death: called from another thread when a member that was not closed has ended, with its name and what is
            known of its end.
        on_report: called from other threads with a rank and what it says of its transfers; what it said before it was
            ready, before `wait_until_ready` returns.
    """

    def __init__(
        self,
        channels: Mapping[str, Channel],
        on_death: Callable[[str], None],
        on_report: Callable[[int, TransferReport], None] = lambda rank, report: None,
    ) -> None:
        self._channels = channels
        self._on_death = on_death
        self._on_report = on_report
        self._closing = self._ended = False
        self._ending = threading.Lock()
        self._died: Future[str] = Future()  # of the first
        self._started: dict[str, Future[None]] = {name: Future() for name in channels}
        self._ready: dict[str, Future[None]] = {name: Future() for name in channels}
        for name, channel in channels.items():
            threading.Thread(target=self._watch, args=(name, channel), name=name, daemon=True).start()

    def wait_until_started(self) -> None:
        """Until each is about to meet the others; the log names every SAID_EVERY_S who is not.

        Raises: RankError, with the name of one that ended, and what it said, as soon as it has.
        """
        _wait(self._started, log_missing=True)

    def wait_until_ready(self) -> None:
        """Until each has its weights. Raises: RankError, as `wait_until_started`."""
        _wait(self._ready)

    def wait_for_death(self, timeout_s: float) -> str | None:
        """Who has ended and how, once it is known."""
        with contextlib.suppress(TimeoutError):
            return self._died.result(timeout_s)
        return None

    def broadcast(self, message: bytes) -> None:
        """Send one message to each, in order. Raises: ChannelClosed."""
        for channel in self._channels.values():
            channel.send_bytes(message)

    def close(self) -> None:
        """End them all. Harmless when repeated, and from several threads: each returns when all have ended."""
        self._closing = True
        with self._ending:
            if not self._ended:
                for channel in self._channels.values():
                    channel.close()
                for channel in self._channels.values():
                    channel.stop()
                self._ended = True

    def _watch(self, name: str, channel: Channel) -> None:
        decoder = msgspec.msgpack.Decoder(Progress | RankReport)
        stages = [self._started[name], self._ready[name]]
        why = None
        try:
            while why is None:
                message = channel.receive(decoder)
                if isinstance(message, RankReport):
                    self._on_report(message.rank, message.transfers)
                    continue
                why = message.error
                if stages and why is None:
                    stages.pop(0).set_result(None)
        except ChannelClosed as closed:
            why = str(closed)
        how = why if why.startswith(name) else f"{name}: {why}"  # a link says itself whose it is
        for stage in stages:
            stage.set_exception(RankError(how))
        if not self._closing:
            with contextlib.suppress(InvalidStateError):  # another one was first
                self._died.set_result(how)
            self._on_death(how)
            self.close()  # they may wait for it, on a device that nobody could take from them


def _wait(stages: Mapping[str, Future[None]], log_missing: bool = False) -> None:
    """Raises: as soon as one of them has failed."""
    began_s = time.monotonic()
    while late := [name for name, stage in stages.items() if not stage.done()]:
        done, _ = wait([stages[name] for name in late], SAID_EVERY_S, FIRST_COMPLETED)
        for stage in done:
            stage.result()
        if not done and log_missing:
            log.warning("not started within %.0f s: %s", time.monotonic() - began_s, ", ".join(late))
    for stage in stages.values():
        stage.result()


def start_ranks(starts: Iterable[StartRank]) -> dict[str, Channel]:
    """A process on this host for each, by name."""
    ranks: dict[str, Channel] = {}
    for start in starts:
        ranks[f"rank {start.rank}"] = child = Child(RANK)
        with contextlib.suppress(ChannelClosed):  # who watches it says so
            child.send(start)
    return ranks
