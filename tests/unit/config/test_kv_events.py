"""The section kv_events of engine.json, and what is said where it is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.kv_events import KvEventsConfig


def loaded(**fields: Any) -> EngineConfig:
    return EngineConfig.resolve({"model": "m", **fields}, relative_to=Path("/x"), origin="engine.json")


def test_events_are_off_unless_there_is_a_section() -> None:
    assert loaded().kv_events is None
    assert loaded(kv_events=None).kv_events is None
    assert loaded(kv_events={}).kv_events == KvEventsConfig(endpoint="tcp://*:5557", topic="", replay_endpoint=None)


def test_the_section_may_be_a_parameter_of_config_pbtxt() -> None:
    events = loaded(kv_events=json.dumps({"topic": "kv@a@b", "hwm": "12"})).kv_events
    assert events == KvEventsConfig(topic="kv@a@b", hwm=12)
    with pytest.raises(ConfigError, match=r"^engine.json: kv_events: not valid JSON: "):
        loaded(kv_events='{"topic": ')


def test_the_section_reaches_the_engine_process() -> None:
    config = loaded(kv_events={"endpoint": "ipc:///run/events"}).settle("cpu")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(config), type=type(config)) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"endpoint": "5557"},
            ["kv_events.endpoint: expected tcp://HOST:PORT up to port 65535, or ipc://PATH", "5557"],
        ),
        ({"endpoint": "tcp://*"}, ["kv_events.endpoint: expected"]),
        ({"endpoint": "tcp://*:65536"}, ["kv_events.endpoint: expected"]),
        ({"endpoint": "inproc://events"}, ["kv_events.endpoint: expected"]),
        ({"replay_endpoint": "udp://*:1"}, ["kv_events.replay_endpoint: expected"]),
        ({"buffer_steps": 0, "hwm": 0}, ["kv_events.buffer_steps: expected", "kv_events.hwm: expected"]),
        ({"buffer_steps": 2**31 - 1}, ["kv_events.buffer_steps: expected an integer >= 1, below 2147483647"]),
        ({"max_queue_size": -1}, ["kv_events.max_queue_size: expected an integer >= 1"]),
        (
            {"endpoint": "tcp://*:65530", "data_parallel_rank": 6},
            ["kv_events.data_parallel_rank: expected a port up to 65535 for endpoint, got 6 beyond it"],
        ),
        ({"publisher": "kafka"}, ["'kafka'", "$.kv_events.publisher"]),
        ({"end_point": "tcp://*:1"}, ["unknown field `end_point`", "$.kv_events"]),
        ([], ["Expected `object | null`", "$.kv_events"]),
    ],
)
def test_what_is_wrong_in_the_section_is_named(fields: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(kv_events=fields)
    assert all(word in str(error.value) for word in ["engine.json", *words]), str(error.value)


def test_without_prefix_caching_there_is_nothing_to_tell() -> None:
    with pytest.raises(ConfigError, match="kv_events: expected null without prefix_caching"):
        loaded(kv_events={}, prefix_caching=False)
    assert loaded(kv_events={"publisher": "null"}, prefix_caching=False).kv_events is not None


@pytest.mark.parametrize(
    ("endpoint", "rank", "binds", "own"),
    [
        ("tcp://*:5557", 0, True, "tcp://*:5557"),
        ("tcp://*:5557", 3, True, "tcp://*:5560"),
        ("tcp://[::]:5557", 1, True, "tcp://[::]:5558"),
        ("tcp://gateway:5557", 3, False, "tcp://gateway:5557"),
        ("ipc:///run/events", 0, True, "ipc:///run/events"),
        ("ipc:///run/events", 2, True, "ipc:///run/events_dp2"),
    ],
)
def test_engines_that_share_a_section_have_endpoints_of_their_own(
    endpoint: str, rank: int, binds: bool, own: str
) -> None:
    config = KvEventsConfig(endpoint=endpoint, replay_endpoint="tcp://*:6000", data_parallel_rank=rank)
    assert (config.binds, config.own_endpoint) == (binds, own)
    assert config.own_replay_endpoint == f"tcp://*:{6000 + rank}"
