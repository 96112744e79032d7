"""gather is the leader's part of joining: it listens until every other host has come, proven itself, and agreed."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import msgspec

from nanoflow_backend.config.engine_config import SettledConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.hosts import handshake
from nanoflow_backend.hosts.address import check_leader, find_interface, leader_address
from nanoflow_backend.hosts.agreement import find_facts
from nanoflow_backend.hosts.link import Link, LinkLost
from nanoflow_backend.hosts.messages import Joined, Welcome
from nanoflow_backend.hosts.secret import Secret
from nanoflow_backend.schedule.source import is_file

log = logging.getLogger(__name__)
SAID_EVERY_S = 10.0  # which hosts are missing
CHECK_S = 0.5
RESOLVE_S = 60.0  # a cluster's resolver may not know a new pod at once
MOST_STRANGERS = 16  # connections that have proven nothing yet


class Gathered(NamedTuple):
    """All hosts, as the leader has them."""

    address: str  # ours, that the others have come to
    interface: str  # of the network that has it
    links: dict[str, Link]  # to the others, by a name that says which ranks they run


def gather(settled: Settled, environment: Mapping[str, str] = os.environ) -> Gathered:
    """Wait until all other hosts have joined.

    What has not proven to have the secret is refused, and the wait goes on.

    Raises:
        ConfigError: naming the setting or the secret's file; the hosts that have not come in time; or what differs on
            one that has.
    """
    config = settled.config
    secret = Secret(Path(config.secret_file or ""))
    check_leader(config.hosts, environment)
    host, port = leader_address(config.leader_address, environment, "leader_address")
    schedule = Path(config.schedule).read_bytes() if is_file(config.schedule) else None
    welcome = Welcome(find_facts(config), msgspec.Raw(msgspec.msgpack.encode(settled)), schedule)
    with _listen(host, port, config.join_timeout_s) as listening:
        address = listening.getsockname()[0]
        interface = find_interface(address, environment)
        log.info("waiting at %s:%d for the other hosts, %d in all", host, port, config.hosts)
        gathering = _Gathering(listening, secret, config, welcome)
        try:
            return Gathered(address, interface, gathering.wait(config.join_timeout_s))
        except BaseException:
            gathering.close()
            raise


class _Gathering:
    """Hosts join on threads of their own; `wait` is for the one that wants them."""

    def __init__(self, listening: socket.socket, secret: Secret, config: SettledConfig, welcome: Welcome) -> None:
        self._listening = listening
        self._secret = secret
        self._config = config
        self._welcome = welcome
        self._changed = threading.Condition()
        self._links: dict[int, Link | None] = {}  # by host; None: it has proven itself just now
        self._joined: set[int] = set()  # those of them that agree
        self._failed: str | None = None
        self._refused = 0
        self._over = False
        self._strangers = threading.Semaphore(MOST_STRANGERS)
        threading.Thread(target=self._accept, name="hosts", daemon=True).start()

    def wait(self, timeout_s: float) -> dict[str, Link]:
        """Raises: ConfigError, see gather."""
        began_s = said_s = time.monotonic()
        with self._changed:
            while missing := self._missing():
                now_s = time.monotonic()
                if self._failed is not None:
                    raise ConfigError(self._failed)
                if now_s - began_s >= timeout_s:
                    raise ConfigError(f"{missing} within {timeout_s:g} s (join_timeout_s)")
                if now_s - said_s >= SAID_EVERY_S:
                    log.warning("%s; waiting for %.0f s more", missing, timeout_s - (now_s - began_s))
                    said_s = now_s
                self._changed.wait(CHECK_S)
            self._over = True
            return {link.name: link for _, link in sorted(self._links.items()) if link}

    def close(self) -> None:
        """Let the hosts that have come go; they will try again."""
        with self._changed:
            self._over = True
            links = [link for link in self._links.values() if link]
        for link in links:
            link.close()

    def _missing(self) -> str | None:
        """Who has not come, in words; hosts that have gone again are forgotten first."""
        for host, link in list(self._links.items()):
            if link is not None and link.ended and host in self._joined:
                log.warning("%s, before all hosts had joined", link.ended)
                self._joined.discard(host)
                del self._links[host]
        missing = [host for host in range(1, self._config.hosts) if host not in self._joined]
        if not missing:
            return None
        refused = f" ({self._refused} connections were refused: see the log)" if self._refused else ""
        address, port = self._listening.getsockname()[:2]
        names = ", ".join(f"host {host} ({ranks_of(self._config, host)})" for host in missing)
        return f"{names}: did not join {address}:{port}{refused}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed when all have come
            while True:
                connection, address = self._listening.accept()
                if self._strangers.acquire(blocking=False):
                    threading.Thread(target=self._meet, args=(connection, address[0]), daemon=True).start()
                else:
                    connection.close()

    def _meet(self, connection: socket.socket, address: str) -> None:
        """One connection, from its first byte until the host has joined or is refused."""
        try:
            asked = handshake.ask(connection, self._secret)
            self._take(connection, asked)
        except (OSError, EOFError, handshake.Refused, handshake.NotYet) as error:
            with self._changed:
                self._refused += 1
            log.warning("refused a connection from %s: %s", address, error)
            connection.close()
            return
        finally:
            self._strangers.release()
        name = f"host {asked.host} ({address}, {ranks_of(self._config, asked.host)})"
        link = Link(connection, asked.keys, name)
        with self._changed:
            self._links[asked.host] = link
            over = self._over
        try:
            if over:  # nobody waits any more
                link.close()
            link.send(self._welcome)
            joined: Joined = link.receive(msgspec.msgpack.Decoder(Joined))
        except LinkLost as lost:
            log.warning("%s, before it had joined", lost)
            with self._changed:
                del self._links[asked.host]
            link.close()
            return
        with self._changed:
            if joined.error is None:
                log.info("%s has joined", name)
                self._joined.add(asked.host)
            else:
                self._failed = f"{name}: {joined.error}"
            self._changed.notify()

    def _take(self, connection: socket.socket, asked: handshake.Asked) -> None:
        """Accept a host that has the secret, and keep its place. Raises: Refused, NotYet; it has been told."""
        hosts, host = self._config.hosts, asked.host
        with self._changed:
            if not 0 < host < hosts:
                why = f"expected a host's number from 1 to {hosts - 1}, for hosts is {hosts}, got {host}"
                handshake.refuse(connection, why)
                raise handshake.Refused(why)
            if self._over or host in self._links:
                why = f"host {host} has joined already"
                handshake.refuse(connection, why, again=True)
                raise handshake.NotYet(why)
            self._links[host] = None
        handshake.accept(connection, asked)


def ranks_of(config: SettledConfig, host: int) -> str:
    """Which ranks run on a host, in words."""
    of_host = config.tensor_parallel // config.hosts
    first = host * of_host
    return f"rank {first}" if of_host == 1 else f"ranks {first} to {first + of_host - 1}"


@contextlib.contextmanager
def _listen(host: str, port: int, timeout_s: float) -> Iterator[socket.socket]:
    """A socket that listens at one address of this host. A name may need some time until a resolver knows it."""
    began_s = time.monotonic()
    while True:
        try:
            *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror as error:
            if time.monotonic() - began_s >= min(timeout_s, RESOLVE_S):
                raise ConfigError(f"leader_address: {host}: {error.strerror}") from None
            time.sleep(CHECK_S)
    if ip_address(str(address[0])).is_unspecified:
        raise ConfigError(f"leader_address: expected an address that the other hosts can reach, got {host}")
    try:
        listening = listen_at(str(address[0]), port)
    except OSError as error:
        expected = "expected an address of this host, the leader, and a free port"
        raise ConfigError(f"leader_address: {expected}, got {host}:{port}: {error.strerror}") from None
    with listening:
        yield listening
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)  # who is in `accept` hears of it


def listen_at(address: str, port: int = 0) -> socket.socket:
    """A socket that listens at one address of this host, and at no other. Raises: OSError."""
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
