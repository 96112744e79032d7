"""This module says where an engine's hosts meet, and which of them this one is: by settings, or by the environment.

One rule: a setting wins; else LeaderWorkerSet's variables, where LWS_LEADER_ADDRESS is set; else torchrun's, where
MASTER_ADDR is. The variables of one launcher are taken together, never mixed with those of another.
"""

from __future__ import annotations

import fcntl
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.rules import split_address

PORT = 29400  # where a launcher names none; torchrun's own rendezvous has it


class Launcher(NamedTuple):
    """The variables by which a launcher tells each host about all of them."""

    address: str
    port: str | None
    hosts: str
    host: str


LAUNCHERS = (
    Launcher("LWS_LEADER_ADDRESS", None, "LWS_GROUP_SIZE", "LWS_WORKER_INDEX"),
    Launcher("MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK"),
)


SIOCGIFADDR = 0x8915  # linux/sockios.h: an interface's address


class Place(NamedTuple):
    """What the environment says of this host; None: nothing."""

    address: tuple[str, int] | None = None  # where the leader listens
    hosts: int | None = None
    host: int | None = None  # 0 is the leader
    variables: Launcher | None = None


def place(environment: Mapping[str, str]) -> Place:
    """Raises: ConfigError, naming the variable and what was expected."""
    for launcher in LAUNCHERS:
        if environment.get(launcher.address):
            port = _number(environment, launcher.port, 1, 2**16) if launcher.port else None
            hosts, host = _number(environment, launcher.hosts, 1, 2**16), _number(environment, launcher.host, 0, 2**16)
            return Place((environment[launcher.address], port or PORT), hosts, host, launcher)
    return Place()


def leader_address(setting: str | None, environment: Mapping[str, str], called: str) -> tuple[str, int]:
    """Where the leader listens: the setting, which is `called` so in messages, or what the environment says.

    Raises: ConfigError, nothing says it.
    """
    if setting is not None:
        if (address := split_address(setting)) is None:
            raise ConfigError(f"{called}: expected HOST:PORT, got {setting!r}")
        return address
    if (address := place(environment).address) is None:
        expected = " or ".join(launcher.address for launcher in LAUNCHERS)
        raise ConfigError(f"{called}: expected HOST:PORT, where the leader listens, or {expected} in the environment")
    return address


def host_number(setting: int | None, environment: Mapping[str, str]) -> int:
    """Which host this is, from 1: the setting (--node-rank), or what the environment says.

    Raises: ConfigError, nothing says it, or it is the leader's.
    """
    here = place(environment)
    number = here.host if setting is None else setting
    source = here.variables.host if setting is None and here.variables else "--node-rank"
    if number is None:
        expected = " or ".join(launcher.host for launcher in LAUNCHERS)
        raise ConfigError(f"--node-rank: expected this host's number, from 1, or {expected} in the environment")
    if number < 1:
        raise ConfigError(f"{source}: expected 1 or more, got {number}: host 0 is the leader, which runs the engine")
    return number


def check_leader(hosts: int, environment: Mapping[str, str]) -> None:
    """Raises: ConfigError, the environment says another number of hosts than the setting, or that this is no leader."""
    here = place(environment)
    if here.variables is None:
        return
    if here.hosts not in (None, hosts):
        raise ConfigError(f"hosts: expected {here.hosts}, as {here.variables.hosts} says, got {hosts}")
    if here.host not in (None, 0):
        raise ConfigError(
            f"hosts: expected the engine on host 0, but {here.variables.host} is {here.host}: run nanoflow rank here"
        )


def find_interface(address: str, environment: Mapping[str, str]) -> str:
    """The name of the network interface that has an address of this host; GLOO_SOCKET_IFNAME wins.

    Left alone, gloo asks the resolver for this host's name, which many answer with a loopback address: the other hosts
    would look for it on themselves.

    Raises: ConfigError, none has it as its first address.
    """
    if chosen := environment.get("GLOO_SOCKET_IFNAME"):
        return chosen
    if address.startswith("127.") or address == "::1":
        return "lo"
    found = _of_ipv6(address) if ":" in address else _of_ipv4(address)
    if found is None:
        raise ConfigError(f"GLOO_SOCKET_IFNAME: expected the name of the network interface that has {address}")
    return found


def _number(environment: Mapping[str, str], name: str, least: int, end: int) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or not least <= int(text[:9]) < end:
        raise ConfigError(f"{name}: expected an integer >= {least}, below {end}, got {text!r}")
    return int(text)


def _of_ipv4(address: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = name.encode().ljust(256, b"\0")
            try:
                answer = fcntl.ioctl(any_socket, SIOCGIFADDR, request)
            except OSError:
                continue  # it has none
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def _of_ipv6(address: str) -> str | None:
    wanted = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        found, *_, name = line.split()
        if found == wanted:
            return name
    return None
