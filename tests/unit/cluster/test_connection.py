"""What is wrong with a cluster is told before work begins, in a line that names it."""

import importlib.util
import os
import socket

import pytest
from msgspec.structs import replace
from support.commands.command_line import assert_one_line, run_here
from support.commands.json_lines import write_lines
from support.places import DEMO_MODEL

from nanoflow_backend.cluster.connection import connect
from nanoflow_backend.cluster.error import ClusterError
from nanoflow_backend.cluster.run import check_room, complete_on_cluster
from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.offline.job_file import JobFile
from nanoflow_backend.offline.result_file import ResultFile


def batch(folder, *arguments):
    source = write_lines(folder / "in.jsonl", [{"prompt": "a"}])
    return run_here("batch", "--model", DEMO_MODEL, "--input", source, "--output", folder / "out.jsonl", *arguments)


@pytest.mark.parametrize("address", ["", "ray://", "host", "host:port", "ray://host:port", "ray://:10001"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match=r"^cluster: expected auto, HOST:PORT or ray://HOST, got "):
        connect(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path, scheme):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"{scheme}127.0.0.1:{taken.getsockname()[1]}"
        refused = batch(tmp_path, "--cluster", address)
    assert_one_line(refused, f"{address.removeprefix('ray://')} cannot be reached: Connection refused")


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "nanoflow_backend.cluster.connection.find_spec", lambda name: None if name == "ray" else found(name)
    )
    assert_one_line(
        batch(tmp_path, "--cluster", "auto"), "cluster: expected ray, which the extra `cluster` brings: pip"
    )


def test_replicas_need_a_cluster_which_chooses_gpus_and_reads_a_file(tmp_path):
    assert_one_line(batch(tmp_path, "--replicas", "2"), "--replicas: expected --cluster with it")
    source, config = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}]), EngineConfig(model=str(DEMO_MODEL))
    os.mkfifo(tmp_path / "pipe")
    with ResultFile(tmp_path / "out.jsonl", source) as results:
        with pytest.raises(ConfigError, match=r"^gpus: expected none with --cluster, for Ray chooses them, got"):
            next(complete_on_cluster(JobFile(source), replace(config, gpus=(0,)), results, "auto", 1))
        with pytest.raises(ConfigError, match=r"pipe: expected a regular file with --cluster"):
            next(complete_on_cluster(JobFile(tmp_path / "pipe"), config, results, "auto", 1))


def test_room_is_counted_by_node():
    nodes = [{"Alive": True, "Resources": {"GPU": 5.0}}, {"Alive": True, "Resources": {"CPU": 9.0, "GPU": 3.0}}]
    dead = {"Alive": False, "Resources": {"GPU": 8.0}}
    check_room([*nodes, dead], 3, 2, "GPU")
    with pytest.raises(
        ConfigError, match=r"^replicas: expected at most 3, got 4: each takes 2 GPU of one node, .* 3, 5$"
    ):
        check_room([*nodes, dead], 4, 2, "GPU")
    with pytest.raises(ConfigError, match="expected at most 0, got 1"):
        check_room([{"Alive": True, "Resources": {}}], 1, 1, "CPU")


def test_an_error_of_ours_is_found_in_what_ray_tells():
    told = (
        "The actor died because of an error\n  File x\nnanoflow_backend.config.error.ConfigError: dtype: expected y\n\n"
    )
    assert str(ClusterError.of(RuntimeError(told))) == "dtype: expected y"
    assert str(ClusterError.of(RuntimeError("a\nb: c\n"))) == "the cluster gave up: b: c"
    assert str(ClusterError.of(RuntimeError())) == "the cluster gave up: RuntimeError"
