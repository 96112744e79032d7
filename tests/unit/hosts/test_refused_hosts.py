"""Hosts that do not join, and why: both ends name what does not agree; the ranks here are processes without torch."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import msgspec
import pytest
from support.hosts.running import Running, led, settled
from support.places import DEMO_MODEL

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.hosts import agreement, gathering
from nanoflow_backend.hosts.gathering import gather
from nanoflow_backend.hosts.messages import Welcome

pytestmark = pytest.mark.timeout(60)


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
        unknown = msgspec.Raw(msgspec.msgpack.encode({"unknown": 1}))
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
