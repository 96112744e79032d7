"""Host is another host than the leader's: it joins, runs its ranks for as long as the leader does, and joins again."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
from msgspec.structs import replace

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.hosts import handshake
from nanoflow_backend.hosts.address import find_interface, place
from nanoflow_backend.hosts.agreement import find_differences, find_unexpected
from nanoflow_backend.hosts.link import Link
from nanoflow_backend.hosts.members import Members, start_ranks
from nanoflow_backend.hosts.messages import Begin, Joined, Progress, RankReport, StartRank, Welcome
from nanoflow_backend.hosts.secret import Secret
from nanoflow_backend.kvcache.tier import TransferReport
from nanoflow_backend.process.channel import ChannelClosed

log = logging.getLogger(__name__)
RETRY_S = 1.0
LET_GO_S = 2.0  # for the leader to close the link once it knows that a rank has ended


class Host:
    """One of `hosts` - 1. There is no torch in this process, so it hears of a lost link whatever its ranks wait for.

    Args:
        model: this host's folder of the model.
        leader: where the leader listens, host and port.
        number: which host this is, from 1.
        secret: what the hosts share.
        patience_s: the longest time without a leader.
        wanted: fields of engine.json that the leader must have so.
    """

    def __init__(
        self,
        model: Path,
        leader: tuple[str, int],
        number: int,
        secret: Secret,
        patience_s: float,
        wanted: Mapping[str, str],
    ) -> None:
        self._model = model
        self._leader = leader
        self._number = number
        self._secret = secret
        self._patience_s = patience_s
        self._wanted = wanted
        self._joined = self._leaving = False

    def leave(self) -> None:
        """To be called by a signal's handler: end when the leader does, whose requests may still run; at once without
        a leader.

        Raises: KeyboardInterrupt, there is none.
        """
        self._leaving = True
        if not self._joined:
            raise KeyboardInterrupt
        log.info("leaving when the leader does")

    def run(self) -> None:
        """Join, again and again, until it is to leave.

        Raises:
            ConfigError: the leader refuses this host, or the other way round; or there was no leader for `patience_s`.
            KeyboardInterrupt: the leader has been told.
        """
        while not self._leaving:
            link = self._join()
            try:
                self._joined = True
                self._serve(link)
            except ChannelClosed as closed:
                next_step = "leaving" if self._leaving else "joining again"
                log.warning("%s; the ranks of this host have ended; %s", closed, next_step)
            except KeyboardInterrupt:
                with contextlib.suppress(ChannelClosed):
                    link.send(Progress("nanoflow rank was stopped there"))
                raise
            finally:
                self._joined = False
                link.close()

    def _join(self) -> Link:
        """Dial until the leader takes us."""
        where = "{}:{}".format(*self._leader)
        began_s = time.monotonic()
        said = ""
        while True:
            try:
                connection = socket.create_connection(self._leader, timeout=handshake.HANDSHAKE_S)
                try:
                    keys = handshake.join(connection, self._secret, self._number)
                except BaseException:
                    connection.close()
                    raise
                log.info("joined %s as host %d", where, self._number)
                return Link(connection, keys, f"the leader ({where})")
            except handshake.Refused as refused:
                raise ConfigError(f"{where}: {refused}") from None
            except (OSError, EOFError, handshake.NotYet) as error:
                why = str(getattr(error, "strerror", None) or error or type(error).__name__)
            if time.monotonic() - began_s >= self._patience_s:
                raise ConfigError(f"found no leader at {where} within {self._patience_s:g} s: {why}")
            if why != said:
                log.info("no leader at %s yet: %s", where, why)
                said = why
            time.sleep(RETRY_S)

    def _serve(self, link: Link) -> None:
        """Start the ranks and hand them what comes. Raises: ChannelClosed, when the link ends."""
        welcome: Welcome = link.receive(msgspec.msgpack.Decoder(Welcome))
        try:
            settled = self._agree(welcome)
            interface = find_interface(link.address, os.environ)
        except ConfigError as error:
            with contextlib.suppress(ChannelClosed):
                link.send(Joined(str(error)))
                link.wait_until_closed(LET_GO_S)
            raise
        link.send(Joined())
        begin: Begin = link.receive(msgspec.msgpack.Decoder(Begin))
        with self._on_this_host(settled, welcome.schedule) as settled:
            config = settled.config
            of_host = config.tensor_parallel // config.hosts
            first = self._number * of_host
            ranks = range(first, first + of_host)
            members = Members(
                start_ranks(StartRank(settled, rank, begin.rendezvous, interface) for rank in ranks),
                on_death=lambda how: self._tell(link, how),
                on_report=lambda rank, report: self._hand_on(link, rank, report),
            )
            try:
                threading.Thread(target=self._tell_progress, args=(members, link), daemon=True).start()
                while True:
                    message = link.receive_bytes()
                    with contextlib.suppress(ChannelClosed):  # the leader has been told
                        members.broadcast(message)
            finally:
                members.close()

    def _agree(self, welcome: Welcome) -> Settled:
        """What the leader has settled. Raises: ConfigError, with all that differs here."""
        differences = find_differences(welcome.facts, self._model)
        if not differences:
            settled = msgspec.msgpack.decode(welcome.settled, type=Settled)
            differences = find_unexpected(settled.config, self._wanted) + self._said_otherwise(settled.config.hosts)
        if differences:
            raise ConfigError("; ".join(differences))
        return settled

    def _said_otherwise(self, hosts: int) -> list[str]:
        """The launcher of this host counts others than the leader's settings."""
        here = place(os.environ)
        if here.variables is None or here.hosts in (None, hosts):
            return []
        return [f"hosts: the leader has {hosts}, {here.variables.hosts} says {here.hosts} on this host"]

    @contextlib.contextmanager
    def _on_this_host(self, settled: Settled, schedule: bytes | None) -> Iterator[Settled]:
        """With this host's folder of the model, and the leader's schedule in a file of this host."""
        with tempfile.TemporaryDirectory(prefix="nanoflow-host-") as folder:  # 0700
            config = replace(settled.config, model=str(self._model))
            if schedule is not None:
                file = Path(folder) / "schedule.json"
                file.write_bytes(schedule)
                config = replace(config, schedule=str(file))
            yield replace(settled, config=config)

    def _tell_progress(self, members: Members, link: Link) -> None:
        """On a thread of its own: what all ranks have reached. Who watches a rank says it if one does not."""
        with contextlib.suppress(RuntimeError):
            members.wait_until_started()
            link.send(Progress())
            members.wait_until_ready()
            link.send(Progress())

    def _hand_on(self, link: Link, rank: int, report: TransferReport) -> None:
        with contextlib.suppress(ChannelClosed):  # who receives from the link ends the rank
            link.send(RankReport(rank, report))

    def _tell(self, link: Link, how: str) -> None:
        """A rank has ended: the leader ends the others, and closes the link."""
        log.error("%s", how)
        with contextlib.suppress(ChannelClosed):
            link.send(Progress(how))
            link.wait_until_closed(LET_GO_S)
        link.close()
