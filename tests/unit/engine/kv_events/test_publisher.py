"""KvEventPublisher over real sockets: in order, replayed, bounded, and clear about what it cannot have."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zmq
from support.engine.page_map import PageMap
from support.engine.subscriber import Subscriber
from support.waiting import until

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.kv_events import KvEventsConfig
from nanoflow_backend.engine.kv_events import publisher
from nanoflow_backend.engine.kv_events.publisher import KvEventPublisher, open_publisher
from nanoflow_backend.kvcache.page_events import Medium

GPU = Medium.DEVICE


@pytest.fixture
def endpoints(tmp_path: Path) -> dict[str, Any]:
    return {"endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/replay"}


@pytest.fixture
def publishing() -> Iterator[Callable[..., KvEventPublisher]]:
    """Makes publishers that are closed in the end."""
    made = []

    def make(**fields: Any) -> KvEventPublisher:
        made.append(KvEventPublisher(KvEventsConfig(**fields)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def page(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "big"), digest_size=32).digest()


def store(publisher: KvEventPublisher, number: int) -> None:
    """A step that stores a page of its own."""
    publisher.pages.stored(page(number), None, array("i", [number] * 4), GPU)
    publisher.publish()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Not what is only told: other tests may have the log at that level."""
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def listens(subscriber: Subscriber, publisher: KvEventPublisher) -> None:
    """Return once what is published arrives: a subscription takes a moment to get through."""
    while not subscriber.live.poll(20):
        publisher.pages.cleared()
        publisher.publish()
    list(subscriber.waiting())


def test_a_subscriber_hears_of_every_step_in_order(
    publishing: Callable[..., KvEventPublisher], endpoints: dict[str, Any]
) -> None:
    sender = publishing(**endpoints, topic="kv@pod@model", data_parallel_rank=0)
    with Subscriber(endpoints["endpoint"], topic="kv@") as gateway:
        listens(gateway, sender)
        sender.publish()  # nothing happened: no message
        for number in range(100):
            store(sender, number)
        heard = [gateway.receive() for _ in range(100)]
    numbers = [number for _, number, _ in heard]
    assert numbers == list(range(numbers[0], numbers[0] + 100))
    assert {topic for topic, _, _ in heard} == {b"kv@pod@model"}
    known = PageMap()
    for _, _, payload in heard:
        assert known.take(payload) == ["BlockStored"]
    assert list(known.blocks["GPU"].values()) == [(None, (number,) * 4) for number in range(100)]


def test_who_comes_late_makes_up_for_it_by_a_replay(
    publishing: Callable[..., KvEventPublisher], endpoints: dict[str, Any]
) -> None:
    rng = random.Random(3)
    sender = publishing(**endpoints)
    stored: set[int] = set()
    steps = 0
    for number in range(3_000):  # more messages than a socket holds by default
        store(sender, number)
        stored.add(number)
        steps += 1
        if rng.random() < 0.4:
            gone = rng.choice(sorted(stored))
            stored.discard(gone)
            sender.pages.removed(page(gone), GPU)
            sender.publish()
            steps += 1
    until(lambda: sender._queue.empty())
    with Subscriber(endpoints["endpoint"], endpoints["replay_endpoint"]) as gateway:
        until(lambda: len(list(gateway.replay(steps - 9))) == 9)
        replayed = list(gateway.replay(0))
        assert list(gateway.replay(steps)) == []
    assert [number for _, number, _ in replayed] == list(range(steps))
    known = PageMap()
    for _, _, payload in replayed:
        known.take(payload)
    assert {tokens[0] for _, tokens in known.blocks["GPU"].values()} == stored


def test_no_more_is_kept_than_was_said(publishing: Callable[..., KvEventPublisher], endpoints: dict[str, Any]) -> None:
    sender = publishing(**endpoints, buffer_steps=5)
    with Subscriber(endpoints["endpoint"], endpoints["replay_endpoint"]) as gateway:
        for number in range(20):
            store(sender, number)
        until(lambda: [number for _, number, _ in gateway.replay(0)] == [15, 16, 17, 18, 19])


def test_a_slow_subscriber_holds_up_nobody_and_sees_what_it_missed(
    publishing: Callable[..., KvEventPublisher], endpoints: dict[str, Any]
) -> None:
    steps = 5_000
    sender = publishing(**endpoints, hwm=10)
    with Subscriber(endpoints["endpoint"], endpoints["replay_endpoint"], hwm=10) as slow:
        listens(slow, sender)
        for number in range(steps):
            sender.pages.stored(page(number), None, array("i", range(200)), GPU)
            sender.publish()
        until(lambda: sender._queue.empty())
        heard = [number for _, number, _ in slow.waiting()]
        assert len(heard) < steps
        while not slow.live.poll(20):  # it reads again: soon messages come through
            store(sender, steps)
        heard.append(slow.receive()[1])
        earlier, later = next(pair for pair in pairwise(heard) if pair[1] > pair[0] + 1)
        missed = [number for _, number, _ in slow.replay(earlier + 1) if number < later]
        assert missed == list(range(earlier + 1, later))


def test_what_waits_to_be_sent_is_bounded_and_the_gap_shows(
    publishing: Callable[..., KvEventPublisher],
    endpoints: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sender = publishing(**endpoints, max_queue_size=3)
    with Subscriber(endpoints["endpoint"], endpoints["replay_endpoint"]) as gateway:
        with sender._keeping, caplog.at_level(logging.WARNING):  # the sending thread waits for this
            store(sender, 0)
            until(lambda: sender._queue.empty())  # it has taken this one
            for number in range(1, 10):
                store(sender, number)
        until(lambda: sender._queue.empty())
        store(sender, 10)
        until(lambda: [number for _, number, _ in gateway.replay(0)] == [0, 1, 2, 3, 10])
    assert warnings(caplog) == ["kv_events: 3 batches wait: dropped from 4 on"]


def test_an_engine_may_go_to_its_only_subscriber(publishing: Callable[..., KvEventPublisher]) -> None:
    with zmq.Context() as context, context.socket(zmq.SUB) as central:
        port = central.bind_to_random_port("tcp://127.0.0.1")
        central.subscribe("")
        ranks = [publishing(endpoint=f"tcp://127.0.0.1:{port}", data_parallel_rank=rank) for rank in (0, 1)]
        heard = set()

        def both_are_heard() -> bool:
            for each in ranks:
                each.pages.cleared()
                each.publish()
            if central.poll(20):
                known = PageMap()
                known.take(central.recv_multipart()[2])
                heard.add(known.rank)
            return heard == {0, 1}

        until(both_are_heard)


def test_each_engine_has_ports_of_its_own(publishing: Callable[..., KvEventPublisher]) -> None:
    port = 20_000 + 25 * (os.getpid() % 400)  # below those that the system gives to clients
    fields = {"endpoint": f"tcp://*:{port}", "replay_endpoint": f"tcp://*:{port + 10}"}
    senders = [publishing(**fields, data_parallel_rank=rank) for rank in (0, 1)]
    for rank, sender in enumerate(senders):
        store(sender, rank)
        with Subscriber(f"tcp://127.0.0.1:{port + rank}", f"tcp://127.0.0.1:{port + 10 + rank}") as gateway:
            until(lambda gateway=gateway: list(gateway.replay(0)))
            ((_, _, payload),) = gateway.replay(0)
        known = PageMap()
        known.take(payload)
        assert known.rank == rank
    with pytest.raises(ConfigError, match=rf"kv_events.endpoint: cannot bind tcp://\*:{port}: Address already in use"):
        publishing(endpoint=f"tcp://*:{port}")
    with pytest.raises(ConfigError, match=r"kv_events.replay_endpoint: cannot bind .*: Address already in use"):
        publishing(endpoint=f"tcp://*:{port + 20}", replay_endpoint=f"tcp://*:{port + 11}")
    publishing(endpoint=f"tcp://*:{port + 20}")  # what failed holds nothing


def test_a_senseless_request_for_a_replay_is_left_unanswered_and_the_next_is_not(
    publishing: Callable[..., KvEventPublisher], endpoints: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    sender = publishing(**endpoints)
    store(sender, 0)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer, caplog.at_level(logging.WARNING):
        dealer.linger = 0
        dealer.connect(endpoints["replay_endpoint"])
        for request in ([b"replay"], [b"", b"\0" * 7], [b"", b"\0" * 8, b""]):
            dealer.send_multipart(request)
        with Subscriber(endpoints["endpoint"], endpoints["replay_endpoint"]) as gateway:
            until(lambda: len(list(gateway.replay(0))) == 1)
        until(lambda: len(warnings(caplog)) == 3)
        assert not dealer.poll(0)


def test_without_pyzmq_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"kv_events: needs the events extra, .*'nanoflow-triton\[events\]'"):
        KvEventPublisher(KvEventsConfig())


def test_a_topic_may_name_the_pod(monkeypatch: pytest.MonkeyPatch, endpoints: dict[str, Any]) -> None:
    monkeypatch.setenv("POD_IP", "10.0.0.7")
    assert KvEventsConfig(topic="kv@${POD_IP}@a$$b").filled_topic() == "kv@10.0.0.7@a$b"
    with pytest.raises(ConfigError, match=r"kv_events.topic: .*names 'NO_SUCH_NAME', which the environment has not"):
        KvEventPublisher(KvEventsConfig(**endpoints, topic="kv@${NO_SUCH_NAME}@m"))
    with pytest.raises(ConfigError, match=r"kv_events.topic: Invalid placeholder.* in 'kv@\$'"):
        KvEventPublisher(KvEventsConfig(**endpoints, topic="kv@$"))


def test_nobody_publishes_unless_asked_to() -> None:
    assert open_publisher(None) is None
    assert open_publisher(KvEventsConfig(publisher="null")) is None


def test_a_process_that_never_closes_it_ends(endpoints: dict[str, Any]) -> None:
    code = f"""
from {publisher.__name__} import KvEventPublisher, KvEventsConfig
publisher = KvEventPublisher(KvEventsConfig(**{endpoints!r}))
publisher.pages.cleared()
publisher.publish()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=20, check=True).returncode == 0
