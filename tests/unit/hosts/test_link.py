"""Link: messages arrive whole and in order, only from who has the key, and a silent end is noticed."""

import itertools
import os
import random
import socket
import threading
import time

import msgspec
import pytest
from support.hosts.wire import connected

from nanoflow_backend.hosts import link as link_module
from nanoflow_backend.hosts.link import Keys, Link, LinkLost
from nanoflow_backend.hosts.messages import Progress

A, B = os.urandom(32), os.urandom(32)
ANY = msgspec.msgpack.Decoder()


def linked(lost_s: float = 30.0) -> tuple[Link, Link]:
    one, other = connected()
    return Link(one, Keys(A, B), "host 1", 0.05, lost_s), Link(other, Keys(B, A), "the leader", 0.05, lost_s)


def only_one_end(lost_s: float = 30.0) -> tuple[Link, socket.socket]:
    one, other = connected()
    return Link(one, Keys(A, B), "host 1", 0.05, lost_s), other


def test_messages_of_all_sizes_come_in_order_in_both_directions() -> None:
    leader, host = linked()
    rng = random.Random(3)
    sizes = [1, 5, 2**16 - 1, 2**16, 3 * 2**20 + 1, *(rng.randrange(1, 2000) for _ in range(200))]
    messages = [rng.randbytes(size) for size in sizes]
    for here, there in ((leader, host), (host, leader)):
        sender = threading.Thread(target=lambda here=here: [here.send_bytes(message) for message in messages])
        sender.start()
        assert [there.receive_bytes() for _ in messages] == messages
        sender.join()
    leader.close()
    with pytest.raises(LinkLost, match="the leader: has closed the link"):
        host.receive(ANY)
    with pytest.raises(LinkLost, match="the leader: has closed the link"):
        host.send_bytes(b"x")
    host.close()


def test_an_idle_link_lives_and_a_silent_one_is_lost() -> None:
    leader, host = linked(lost_s=1.0)
    time.sleep(1.5)  # nothing but pings
    host.send(Progress())
    assert leader.receive(msgspec.msgpack.Decoder(Progress)) == Progress()
    leader.close()
    host.close()
    silent, peer = only_one_end(lost_s=0.5)
    began_s = time.monotonic()
    with pytest.raises(LinkLost, match=r"host 1: nothing comes for 0\.5 s: the host or the network is gone"):
        silent.receive(ANY)
    assert 0.4 < time.monotonic() - began_s < 10
    silent.close()
    peer.close()


def test_an_end_that_takes_nothing_is_lost_though_it_says_that_it_is_there() -> None:
    link, wire = only_one_end(lost_s=2.0)
    over = threading.Event()

    def ping() -> None:
        for number in itertools.count():
            if over.wait(0.05):
                return
            wire.sendall(bytes(4) + link_module._code(B, number, b""))

    pinging = threading.Thread(target=ping)
    pinging.start()
    with pytest.raises(LinkLost, match="host 1: takes nothing for 2 s"):
        link.send_bytes(bytes(2**25))  # more than any buffer on the way
    over.set()
    pinging.join()
    link.close()
    wire.close()


@pytest.mark.parametrize("how", ["changed", "repeated", "another key", "too long"])
def test_what_the_other_end_did_not_send_ends_the_link(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    link, wire = only_one_end()
    frames = [
        len(message).to_bytes(4, "big") + link_module._code(B, number, message) + message
        for number, message in enumerate((b"first", b"second"))
    ]
    if how == "changed":
        frames[1] = frames[1][:-1] + b"D"
    elif how == "repeated":
        frames[1] = frames[0]
    elif how == "another key":
        frames[1] = frames[1][:4] + link_module._code(A, 1, b"second") + b"second"
    else:
        frames[1] = (2**32 - 1).to_bytes(4, "big")
    wire.sendall(frames[0])
    assert link.receive_bytes() == b"first"
    wire.sendall(frames[1])
    expected = "a message of 4294967295 bytes" if how == "too long" else "does not come from who has the secret"
    with pytest.raises(LinkLost, match=expected):
        link.receive_bytes()
    link.close()
    wire.close()


def test_a_message_that_is_none_of_ours_ends_the_link() -> None:
    leader, host = linked()
    host.send_bytes(b"\xc1 not msgpack")
    with pytest.raises(LinkLost, match="host 1: sent something else than was expected"):
        leader.receive(msgspec.msgpack.Decoder(Progress))
    leader.close()
    host.close()
