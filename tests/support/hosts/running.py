"""A leader without a rank of its own, and hosts that join it, each `nanoflow rank` on a thread of the test."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from msgspec.structs import replace
from support.places import DEMO_MODEL

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.hosts.gathering import gather
from nanoflow_backend.hosts.host import Host
from nanoflow_backend.hosts.members import Members
from nanoflow_backend.hosts.messages import Begin
from nanoflow_backend.hosts.secret import Secret
from nanoflow_backend.kvcache.tier import TransferReport
from nanoflow_backend.models.hugging_face import read_model_config


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def settled(place: Path, **fields: object) -> Settled:
    config = EngineConfig(
        model=str(DEMO_MODEL),
        tensor_parallel=4,
        hosts=2,
        secret_file=str(place / "secret"),
        leader_address=f"127.0.0.1:{free_port()}",
        join_timeout_s=30,
    )
    return Settled(replace(config, **fields).settle("cpu"), read_model_config(DEMO_MODEL))


class Running:
    """`nanoflow rank` on a thread: how it ends."""

    hosts: ClassVar[list[Running]] = []

    def __init__(
        self,
        place: Path,
        leader: Settled,
        model: Path = DEMO_MODEL,
        number: int = 1,
        address: tuple[str, int] | None = None,
        patience_s: float = 30.0,
        wanted: dict[str, str] | None = None,
        secret: str = "secret",
    ) -> None:
        where = (leader.config.leader_address or "").split(":")
        self._host = Host(
            model, address or (where[0], int(where[1])), number, Secret(place / secret), patience_s, wanted or {}
        )
        self.ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.hosts.append(self)

    def end(self) -> None:
        """Its leader is gone: let it look for no other."""
        self._host._patience_s = 0
        self._thread.join(30)

    def _run(self) -> None:
        try:
            self._host.run()
        except BaseException as error:
            self.ended = error

    def wait(self) -> str:
        self._thread.join(30)
        assert isinstance(self.ended, ConfigError)
        return str(self.ended)


@contextlib.contextmanager
def led(
    leader: Settled,
    deaths: list[str],
    on_report: Callable[[int, TransferReport], None] = lambda rank, report: pytest.fail("nobody has tiers"),
) -> Iterator[Members]:
    """The leader's part, without a rank of its own."""
    address, interface, links = gather(leader, {})
    assert interface == "lo"
    group = Members(dict(links), deaths.append, on_report)
    try:
        for one in links.values():
            one.send(Begin(f"{address}:1234"))
        group.wait_until_started()
        group.wait_until_ready()
        yield group
    finally:
        group.close()
