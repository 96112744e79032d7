"""nanoflow batch --cluster, on clusters of Ray whose nodes are all on this machine; against a run without one."""

import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.commands.command_line import assert_one_line, run_here, start
from support.commands.json_lines import write_lines

from benchmarks.cluster.local_cluster import LocalCluster
from nanoflow_backend.cluster.connection import connect
from nanoflow_backend.cluster.lines import complete
from nanoflow_backend.config.engine_config import EngineConfig


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=2, cpus=2, gpus=1) as cluster:
        yield cluster


def make_input(folder):
    """Prompts, some with seeds, some drawn; bad lines; and what Ray's own reader of JSON would change."""
    lines = [{"prompt": f"page {number}", "max_tokens": 24, "temperature": number % 2} for number in range(400)]
    lines[3] = b"{not json"
    lines[5] = {"prompt": "2026-12-01", "max_tokens": 4, "seed": 7, "id": {"when": "2026-12-01T10:00:00", "a": None}}
    lines[64] = b'\xef\xbb\xbf{"prompt": "a"}'  # a byte order mark belongs before the first line alone
    lines[70] = {"prompt": "a", "top_p": 2, "id": "bad"}
    lines[71] = b"   "
    lines[72] = b'  {"prompt": "b", "max_tokens": 2, "id": "\\u00e9"}  '
    return write_lines(folder / "in.jsonl", lines)


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(path, more_than, process=None):
    deadline = time.monotonic() + 120
    while lines_in(path) <= more_than:
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_lines_are_those_of_one_machine_through_the_loss_of_command_engine_and_node(cluster, model, tmp_path):
    source, whole, output = make_input(tmp_path), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    arguments = ("batch", "--model", model, "--input", source, "--set", "dense_batch_tokens=32", "--set", "device=cpu")
    alone = run_here(*arguments, "--output", whole)
    assert alone.stderr.splitlines()[-1] == "nanoflow: 396 lines done, 3 failed"

    on_cluster = (*arguments, "--output", output, "--cluster")
    command = start(*on_cluster, cluster.address, stderr=subprocess.PIPE)
    wait_for_lines(output, 0, command)
    command.send_signal(signal.SIGKILL)
    command.communicate(timeout=60)
    done = lines_in(output)
    assert 0 < done < 399
    assert whole.read_bytes().startswith(output.read_bytes())

    def kill_engine_and_node():
        wait_for_lines(output, done)
        cluster.kill_engine()
        cluster.kill_node(1)
        return lines_in(output)

    with ThreadPoolExecutor() as thread:
        killed = thread.submit(kill_engine_and_node)
        again = run_here(*on_cluster, cluster.client_address, "--replicas", "2")
        assert killed.result() < 399
    assert (again.returncode, again.stderr.splitlines()[-1]) == (1, "nanoflow: 396 lines done, 3 failed")
    assert output.read_bytes() == whole.read_bytes()
    here = run_here(*arguments, "--output", output)
    assert (here.returncode, here.stderr) == (1, "nanoflow: 396 lines done, 3 failed\n"), (
        "no cluster is needed to go on"
    )


def test_more_replicas_than_there_is_room_for_are_refused(cluster, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"prompt": "a"}])
    arguments = ("batch", "--model", model, "--input", source, "--output", tmp_path / "out.jsonl")
    refused = run_here(*arguments, "--cluster", cluster.address, "--replicas", "9", "--set", "device=cpu")
    assert_one_line(refused, "replicas: expected at most")
    assert_one_line(refused, "got 9: each takes 1 CPU of one node")
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_the_stage_can_be_put_behind_any_dataset(cluster, model):
    """As docs/using.md has it. With GPUs Ray Data asks for a batch size, before anything runs."""
    ray = connect(cluster.address)
    try:
        config = EngineConfig(model=str(model), device="cpu", dense_batch_tokens=32)
        lines = ray.data.from_items([{"number": n, "line": b'{"prompt": "page", "max_tokens": 2}'} for n in range(3)])
        assert complete(lines, config, replicas=1, gpu=True).schema is not None
        rows = complete(lines, config, replicas=1, gpu=False).take_all()
    finally:
        ray.shutdown()
    assert sorted(row["number"] for row in rows) == [0, 1, 2]
    assert all(row["result"].startswith(b'{"id":%d,"text":"' % row["number"]) for row in rows)
