"""Hosts join a leader, run its ranks, and join again; the ranks here are processes without torch."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import msgspec
import pytest
from support.hosts.running import Running, led, settled
from support.hosts.wire import Wire
from support.places import DEMO_MODEL
from support.process_tree import alive
from support.waiting import until

from nanoflow_backend.hosts import gathering, host, link
from nanoflow_backend.kvcache.tier import TransferReport

pytestmark = pytest.mark.timeout(60)
ENCODE = msgspec.msgpack.encode


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
