"""nanoflow batch --cluster, on clusters of Ray whose nodes are all on this machine; against a run without one."""

import signal
import subprocess
import time

import pytest
from support.commands.command_line import run_here, start
from support.commands.json_lines import write_lines

from benchmarks.cluster.local_cluster import LocalCluster


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(nodes=3, clients=True) as cluster:
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
    source = make_input(tmp_path)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    settings = ("--set", "dense_batch_tokens=32")
    arguments = ("batch", "--model", model, "--input", source, *settings)
    t = time.time()
    alone = run_here(*arguments, "--output", whole)
    print("alone", time.time() - t)
    assert alone.returncode == 1
    assert alone.stderr.splitlines()[-1] == "nanoflow: 396 lines done, 3 failed"

    on_cluster = (*arguments, "--output", output, "--replicas", "2")
    command = start(*on_cluster, "--cluster", cluster.address, stderr=subprocess.PIPE)
    wait_for_lines(output, 0, command)
    command.send_signal(signal.SIGKILL)
    command.communicate(timeout=60)
    done = lines_in(output)
    print("first", time.time() - t, done)
    assert 0 < done < 399

    command = start(*on_cluster, "--cluster", cluster.address, stderr=subprocess.PIPE)
    wait_for_lines(output, done, command)
    killed = [i for i, e in enumerate(cluster.engines()) if e]
    print(killed, lines_in(output))
    (first, second) = killed
    cluster.kill_engine(first)
    wait_for_lines(output, lines_in(output), command)
    cluster.kill_node(second)
    print("killed", time.time() - t, lines_in(output))
    told = command.communicate(timeout=120)[1]
    print("end", time.time() - t)
    print(told)
    assert command.returncode == 1, told
    assert output.read_bytes() == whole.read_bytes()
