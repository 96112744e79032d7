"""Where hosts meet: settings win, then LeaderWorkerSet's variables, then torchrun's."""

import socket

import pytest

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.hosts.address import check_leader, find_interface, host_number, leader_address

LWS = {"LWS_LEADER_ADDRESS": "engine-0.engine.llm", "LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1"}
TORCHRUN = {"MASTER_ADDR": "node-a", "MASTER_PORT": "29511", "NNODES": "4", "NODE_RANK": "3"}


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
    [
        ("10.0.0.1:5000", LWS | TORCHRUN, ("10.0.0.1", 5000)),
        ("[fd00::1]:5000", {}, ("fd00::1", 5000)),
        (None, LWS | TORCHRUN, ("engine-0.engine.llm", 29400)),  # MASTER_PORT is of the other launcher
        (None, TORCHRUN, ("node-a", 29511)),
        (None, {"MASTER_ADDR": "node-a", "LWS_LEADER_ADDRESS": ""}, ("node-a", 29400)),
    ],
)
def test_the_leaders_address(setting: str | None, environment: dict[str, str], expected: tuple[str, int]) -> None:
    assert leader_address(setting, environment, "leader_address") == expected


@pytest.mark.parametrize(
    ("setting", "environment", "complaint"),
    [
        (None, {}, "--leader: expected HOST:PORT, .* or LWS_LEADER_ADDRESS or MASTER_ADDR in the environment"),
        ("node-a", {}, "--leader: expected HOST:PORT, got 'node-a'"),
        ("fd00::1:5000", {}, "--leader: expected HOST:PORT"),
        ("a:0", {}, "--leader: expected HOST:PORT"),
        (None, TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT: expected an integer >= 1, below 65536, got 'http'"),
    ],
)
def test_an_address_that_is_none_is_named(setting: str | None, environment: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        leader_address(setting, environment, "--leader")


def test_a_hosts_number() -> None:
    assert host_number(2, LWS) == 2
    assert host_number(None, LWS | TORCHRUN) == 1
    assert host_number(None, TORCHRUN) == 3
    with pytest.raises(ConfigError, match=r"--node-rank: expected .* or LWS_WORKER_INDEX or NODE_RANK"):
        host_number(None, {})
    with pytest.raises(ConfigError, match="LWS_WORKER_INDEX: expected 1 or more, got 0: host 0 is the leader"):
        host_number(None, LWS | {"LWS_WORKER_INDEX": "0"})
    with pytest.raises(ConfigError, match="--node-rank: expected 1 or more, got 0"):
        host_number(0, {})


def test_the_leader_and_its_launcher_agree() -> None:
    check_leader(2, {})
    check_leader(2, LWS | {"LWS_WORKER_INDEX": "0"})
    check_leader(4, {"MASTER_ADDR": "node-a"})
    with pytest.raises(ConfigError, match="hosts: expected 4, as NNODES says, got 2"):
        check_leader(2, TORCHRUN)
    with pytest.raises(ConfigError, match="but LWS_WORKER_INDEX is 1: run nanoflow rank here"):
        check_leader(2, LWS)


def test_the_interface_is_that_of_the_address_and_a_choice_wins() -> None:
    assert find_interface("127.0.0.2", {}) == "lo"
    assert find_interface("::1", {}) == "lo"
    assert find_interface("192.0.2.1", {"GLOO_SOCKET_IFNAME": "eth7"}) == "eth7"
    for nobodys in ("192.0.2.1", "2001:db8::1"):
        with pytest.raises(ConfigError, match=f"GLOO_SOCKET_IFNAME: expected the name .* that has {nobodys}"):
            find_interface(nobodys, {})
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            any_socket.connect(("192.0.2.1", 9))  # sends nothing: it asks which address would be ours
        except OSError:
            return  # this host has no network but loopback
        ours = any_socket.getsockname()[0]
    assert find_interface(ours, {}) in [name for _, name in socket.if_nameindex() if name != "lo"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"hosts": 3}, "hosts: expected 1, 2, 4 or 8, got 3"),
        ({"hosts": 0}, "hosts: expected 1, 2, 4 or 8, got 0"),
        ({"hosts": 4, "tensor_parallel": 2}, r"hosts: expected a divisor of tensor_parallel \(2\), got 4"),
        ({"hosts": 2, "tensor_parallel": 2}, "secret_file: expected a file with the secret that 2 hosts share"),
        ({"leader_address": "somewhere"}, "leader_address: expected HOST:PORT, or .IPV6.:PORT, got 'somewhere'"),
        ({"join_timeout_s": 0}, "join_timeout_s: expected a finite number >= 1"),
        ({"hosts": 2, "tensor_parallel": 4, "secret_file": "s", "gpus": [0]}, "gpus: expected 2 different ids"),
    ],
)
def test_settings_that_make_no_group_are_refused(fields: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        EngineConfig(model="m", **fields)
