"""Hosts join a leader, run its ranks, and join again; the ranks here are processes without torch."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest
from msgspec.structs import replace
from support.hosts.wire import Wire
from support.places import DEMO_MODEL
from support.process_tree import alive
from support.waiting import until

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.settled import Settled
from nanoflow_backend.hosts import agreement, gathering, host, link, members
from nanoflow_backend.hosts.gathering import gather
from nanoflow_backend.hosts.host import Host
from nanoflow_backend.hosts.members import Members
from nanoflow_backend.hosts.messages import Begin, Welcome
from nanoflow_backend.hosts.secret import Secret
from nanoflow_backend.kvcache.tier import TransferReport
from nanoflow_backend.models.hugging_face import read_model_config

pytestmark = pytest.mark.timeout(60)
ENCODE = msgspec.msgpack.encode


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where ranks without torch leave what they saw, and the secret is; links and retries are quick."""
    monkeypatch.setattr(members, "RANK", "support.hosts.fake_rank")
    monkeypatch.setenv("FAKE_RANKS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
    monkeypatch.setattr(host, "RETRY_S", 0.05)
    monkeypatch.setattr(gathering, "CHECK_S", 0.05)
    (tmp_path / "secret").write_text("a" * 64)
    (tmp_path / "secret").chmod(0o600)
    yield tmp_path
    for running in Running.hosts:
        running.end()
    Running.hosts.clear()


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


def got(place: Path, rank: int) -> list[str]:
    path = place / f"got-{rank}"
    return path.read_text().split() if path.exists() else []


def ranks_alive(place: Path) -> list[int]:
    return [pid for path in place.glob("pid-*") if alive(pid := int(path.name.removeprefix("pid-")))]


def test_a_host_runs_its_ranks_and_joins_again_after_the_leader_and_after_a_rank(place: Path) -> None:
    """Its own folder of the model, the leader's schedule, every message in order, no process left."""
    schedule = place / "plan.json"
    schedule.write_text("the plan")
    model = place / "copy"
    shutil.copytree(DEMO_MODEL, model)
    leader, deaths = settled(place, schedule=str(schedule)), []
    running = Running(place, leader, model)
    with led(leader, deaths) as group:
        for number in range(300):
            group.broadcast(ENCODE(number))
        for rank in (2, 3):
            until(lambda rank=rank: len(got(place, rank)) == 300)
            assert got(place, rank) == [str(number) for number in range(300)]
            started = (place / f"start-{rank}").read_text()
            assert started == f"127.0.0.1:1234 lo {model} the plan"
    assert deaths == []
    with led(leader, deaths) as group:
        group.broadcast(ENCODE("end"))
        until(lambda: deaths)
        assert "host 1 (127.0.0.1, ranks 2 to 3): rank " in deaths[0]
        assert "ended with exit code 3" in deaths[0]
    with led(leader, deaths) as group:
        group.broadcast(ENCODE("again"))
        until(lambda: got(place, 2)[-1:] == ["again"] == got(place, 3)[-1:])
    until(lambda: not ranks_alive(place))
    assert running.ended is None


def test_a_host_hands_on_what_its_ranks_report(place: Path) -> None:
    """In order, and before it says that they are ready what they said before they were."""
    leader, deaths, told = settled(place, host_kv_cache_bytes=2**20), [], []
    reports = {rank: [TransferReport([], slots=rank)] for rank in (2, 3)}
    Running(place, leader)
    with led(leader, deaths, lambda rank, report: told.append((rank, report))) as group:
        assert dict(told) == {rank: report for rank, (report,) in reports.items()}
        for number in range(100):
            group.broadcast(ENCODE(number))
            for rank in (2, 3):
                reports[rank].append(TransferReport([number], slots=rank))
        until(lambda: len(told) >= 202)
        for rank in (2, 3):
            assert [report for of, report in told if of == rank] == reports[rank]
    assert deaths == []


def test_a_link_that_is_lost_without_a_word_is_noticed_by_both_ends(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (gathering, host):
        monkeypatch.setattr(
            module, "Link", lambda connection, keys, name: link.Link(connection, keys, name, period_s=0.1, lost_s=2.0)
        )
    leader, deaths = settled(place), []
    wire = Wire(("127.0.0.1", int((leader.config.leader_address or "").split(":")[1])))
    Running(place, leader, address=wire.address)
    with caplog.at_level(logging.INFO), led(leader, deaths):
        assert len(ranks_alive(place)) == 2
        wire.cut()
        began_s = time.monotonic()
        until(lambda: deaths)
        assert deaths == ["host 1 (127.0.0.1, ranks 2 to 3): nothing comes for 2 s: the host or the network is gone"]
        until(lambda: not ranks_alive(place))
        assert time.monotonic() - began_s < 10
        until(lambda: f"the leader ({wire.address[0]}:{wire.address[1]}): nothing comes for 2 s" in caplog.text)
    wire.close()


def test_it_leaves_with_the_leader_and_without_one_at_once(place: Path) -> None:
    leader = settled(place)
    running = Running(place, leader)
    with led(leader, []) as group:
        running._host.leave()
        group.broadcast(ENCODE("work"))  # of requests that still run
        until(lambda: got(place, 2) == ["work"] == got(place, 3))
        assert running._thread.is_alive()
    running._thread.join(30)
    assert running.ended is None
    assert not running._thread.is_alive()
    alone = Running(place, leader)
    with pytest.raises(KeyboardInterrupt):
        alone._host.leave()


def test_a_rank_that_cannot_start_is_named_with_its_host(place: Path) -> None:
    (place / "no weights").touch()
    leader = settled(place)
    Running(place, leader)
    with (
        pytest.raises(RuntimeError, match=r"host 1 \(.*\): rank [23]: ConfigError: no weights here"),
        led(leader, []),
    ):
        pass


def test_another_secret_is_refused_and_the_right_host_still_joins(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "another").write_text("b" * 64)
    (place / "another").chmod(0o600)
    leader = settled(place)
    with caplog.at_level(logging.INFO):
        wrong = Running(place, leader, secret="another")
        right: list[Running] = []
        waiting = threading.Thread(target=lambda: right.append(Running(place, leader)) if wrong.wait() else None)
        waiting.start()
        with led(leader, []):
            pass
    waiting.join()
    assert "this host was refused: it has another secret" in wrong.wait()
    assert "refused a connection from 127.0.0.1: it has another secret (secret_file)" in caplog.text
    assert right[0].ended is None


def test_a_host_that_never_joins_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gathering, "SAID_EVERY_S", 0.3)
    leader = settled(place, hosts=4, join_timeout_s=1.0)
    Running(place, leader, number=2)
    expected = rf"host 1 \(rank 1\), host 3 \(rank 3\): did not join {leader.config.leader_address}"
    with pytest.raises(ConfigError, match=expected + r" within 1 s \(join_timeout_s\)"):
        gather(leader, {})
    assert "host 1 (rank 1), host 3 (rank 3): did not join" in caplog.text
    assert "waiting for 1 s more" in caplog.text  # said before it gave up


def test_no_leader_is_an_end_too(place: Path) -> None:
    leader = settled(place)
    message = Running(place, leader, patience_s=0.2).wait()
    assert message == f"found no leader at {leader.config.leader_address} within 0.2 s: Connection refused"


@pytest.mark.parametrize("how", ["model", "weights", "code", "torch", "setting", "number", "no model", "launcher"])
def test_what_does_not_agree_is_named_at_both_ends(place: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    model, fields = place / "copy", {}
    shutil.copytree(DEMO_MODEL, model)
    leader, deaths = settled(place), []
    expected = f"this host was refused: expected a host's number from 1 to 1, for hosts is 2, got {7}"
    if how == "model":
        (model / "config.json").write_text((model / "config.json").read_text() + " ")
        expected = "the model's config.json: the leader has "
    elif how == "weights":
        (weights,) = model.glob("*.safetensors")
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        expected = f"the model's {weights.name}: the leader has "
    elif how in ("code", "torch"):
        name = {"code": "nanoflow"}.get(how, how)
        other = {**agreement.find_facts(leader.config), name: "another"}
        monkeypatch.setattr(gathering, "find_facts", lambda config: other)
        # A leader of another version has settings of which this one knows nothing.
        unknown = msgspec.Raw(ENCODE({"unknown": 1}))
        monkeypatch.setattr(gathering, "Welcome", lambda facts, _, schedule: Welcome(facts, unknown, schedule))
        expected = f"{name}: the leader has another, this host "
    elif how == "setting":
        fields = {"wanted": {"page_tokens": "32", "dtype": "float32"}}
        expected = "page_tokens: the leader has 16, this host wants 32"
    elif how == "no model":
        shutil.rmtree(model)
        expected = f"{model}: there is no such folder"
    elif how == "launcher":
        for name, value in {"MASTER_ADDR": "127.0.0.1", "NNODES": "4"}.items():
            monkeypatch.setenv(name, value)
        expected = "hosts: the leader has 2, NNODES says 4 on this host"
    running = Running(place, leader, model, number=7 if how == "number" else 1, **fields)
    if how == "number":  # nothing is wrong with the leader: it waits for the right one
        threading.Thread(target=lambda: (running.wait(), Running(place, leader)), daemon=True).start()
        with led(leader, deaths):
            pass
    else:
        with pytest.raises(ConfigError) as refused:
            gather(leader, {})
        assert str(refused.value).startswith("host 1 (127.0.0.1, ranks 2 to 3): ")
        assert expected in str(refused.value)
    assert expected in running.wait()


def test_an_address_of_another_host_or_of_all_is_refused(place: Path) -> None:
    for address, complaint in (
        ("192.0.2.1:29400", "leader_address: expected an address of this host, the leader, and a free port, got 192.0"),
        ("0.0.0.0:29400", "leader_address: expected an address that the other hosts can reach, got 0.0.0.0"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            gather(settled(place, leader_address=address), {})
