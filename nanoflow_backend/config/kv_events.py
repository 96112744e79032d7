"""KvEventsConfig is the section `kv_events` of engine.json: to whom the engine says which KV pages it has, and how."""

from __future__ import annotations

import os
import re
from string import Template
from typing import Literal

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.rules import INT32_END, Rule, broken, whole

LAST_PORT = 65535
TCP = re.compile(r"(tcp://[^\s/]+):([1-9]\d{0,4})", re.ASCII)


def _is_endpoint(value: str) -> bool:
    if tcp := TCP.fullmatch(value):
        return int(tcp[2]) <= LAST_PORT
    return re.fullmatch(r"ipc://[^\0]+", value) is not None


ENDPOINT = Rule(f"tcp://HOST:PORT up to port {LAST_PORT}, or ipc://PATH", _is_endpoint)
RULES = {
    "endpoint": ENDPOINT,
    "replay_endpoint": ENDPOINT,
    "buffer_steps": whole(1, INT32_END - 1),  # with the end of a replay, a limit of the socket
    "hwm": whole(1),
    "max_queue_size": whole(1),
    "data_parallel_rank": whole(0, LAST_PORT),
}


class KvEventsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Names and defaults are those of vLLM's kv_events_config.

    Raises:
        ConfigError: all values that are none, with what was expected.
    """

    publisher: Literal["zmq", "null"] = "zmq"  # null: as without this section
    endpoint: str = "tcp://*:5557"  # of the PUB socket: bound if it has a * or :: or is ipc, else connected
    replay_endpoint: str | None = None  # of the ROUTER socket, bound: asked for batches that a subscriber missed
    topic: str = ""  # of every message; ${NAME} stands for an environment variable, $$ for a dollar
    buffer_steps: int = 10_000  # batches kept for a replay
    hwm: int = 100_000  # messages that wait for one slow subscriber; more are dropped for it
    max_queue_size: int = 100_000  # batches that wait to be sent; more are dropped
    data_parallel_rank: int = 0  # of the engine, among those that share this section: each adds it to its ports

    def __post_init__(self) -> None:
        faults = broken(RULES, {name: getattr(self, name) for name in self.__struct_fields__})
        faults += [
            f"data_parallel_rank: expected a port up to {LAST_PORT} for {name}, got {self.data_parallel_rank} beyond it"
            for name, own in (("endpoint", self.own_endpoint), ("replay_endpoint", self.own_replay_endpoint))
            if not faults and own is not None and not _is_endpoint(own)
        ]
        if faults:
            raise ConfigError("; ".join(f"kv_events.{fault}" for fault in faults))

    @property
    def binds(self) -> bool:
        """Whether subscribers come to `endpoint`; else it is one subscriber's, and the engine goes there."""
        return self.endpoint.startswith("ipc://") or "*" in self.endpoint or "::" in self.endpoint

    @property
    def own_endpoint(self) -> str:
        """This engine's; a subscriber that it connects to is the same for all engines."""
        return self._own(self.endpoint) if self.binds else self.endpoint

    @property
    def own_replay_endpoint(self) -> str | None:
        return self.replay_endpoint and self._own(self.replay_endpoint)

    def filled_topic(self) -> str:
        """Raises: ConfigError, naming the variable that the environment does not have."""
        try:
            return Template(self.topic).substitute(os.environ)
        except KeyError as error:
            raise ConfigError(f"kv_events.topic: {self.topic!r} names {error}, which the environment has not") from None
        except ValueError as error:
            raise ConfigError(f"kv_events.topic: {error} in {self.topic!r}") from None

    def _own(self, endpoint: str) -> str:
        """As vLLM has it."""
        rank, tcp = self.data_parallel_rank, TCP.fullmatch(endpoint)
        if tcp:
            return f"{tcp[1]}:{int(tcp[2]) + rank}"
        return f"{endpoint}_dp{rank}" if rank else endpoint
