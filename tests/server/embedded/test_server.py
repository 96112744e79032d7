"""The embedded server starts, serves this checkout's code, says what is wrong, and leaves nothing behind."""

import contextlib
import http.client
import importlib.metadata
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from support.waiting import until
from tritonclient.utils import InferenceServerException

import nanoflow_backend
from nanoflow_backend.embedded import libpython
from nanoflow_backend.embedded.server import EmbeddedServer, ServerError

CONFIG = """
name: "words"
backend: "python"
model_transaction_policy { decoupled: true }
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ 1 ] } ]
instance_group [ { kind: KIND_MODEL } ]
"""
WORDS_MODEL = """
import nanoflow_backend
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()[0].decode()
            sender = request.get_response_sender()
            for word in [nanoflow_backend.__file__] if text == "which code?" else text.split():
                tensor = pb_utils.Tensor("text_output", np.array([word.encode()], dtype=np.object_))
                sender.send(pb_utils.InferenceResponse([tensor]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
FAILING_MODEL = """
class TritonPythonModel:
    def initialize(self, args):
        raise ValueError("layer 7 has no weights")
    def execute(self, requests):
        pass
"""
# Never unloads, and leaves a process in a session of its own.
STUCK_MODEL = """
import subprocess, sys, time

class TritonPythonModel:
    def initialize(self, args):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    def execute(self, requests):
        pass
    def finalize(self):
        time.sleep(1000)
"""


def repository(folder, model):
    (folder / "words" / "1").mkdir(parents=True)
    (folder / "words" / "config.pbtxt").write_text(CONFIG)
    (folder / "words" / "1" / "model.py").write_text(model)
    return folder


def alive(processes):
    return {pid: name for pid, name in processes.items() if Path(f"/proc/{pid}").exists()}


def shared_memory(prefix):
    return [file.name for file in Path("/dev/shm").glob(f"{prefix}*")]


def assert_free(url):
    host, port = url.split(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
        probe.listen()


def post(server, path, text):
    with contextlib.closing(http.client.HTTPConnection(server.http_url, timeout=30)) as connection:
        connection.request("POST", f"/v2/models/words/{path}", json.dumps({"text_input": text}))
        return connection.getresponse().read().decode()


def stream(server, text):
    """The responses to one gRPC streaming request, up to its final flag."""
    responses = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        tensor = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
        client.async_stream_infer("words", [tensor], enable_empty_final_response=True)
        words = []
        while True:
            response = responses.get(timeout=30)
            if isinstance(response, InferenceServerException):
                raise response
            if response.get_response().parameters["triton_final_response"].bool_param:
                return words
            words.append(response.as_numpy("text_output")[0].decode())


@pytest.fixture(scope="module")
def words(server, tmp_path_factory):
    """A ready server of the words model in explicit mode, started from a folder with another nanoflow_backend in it."""
    decoy = tmp_path_factory.mktemp("decoy")
    (decoy / "nanoflow_backend").mkdir()
    (decoy / "nanoflow_backend" / "__init__.py").write_text("raise ImportError('the code of another checkout')")
    arguments = ["--model-control-mode=explicit", "--load-model=words", "--disable-auto-complete-config"]
    with contextlib.chdir(decoy):
        return server(repository(tmp_path_factory.mktemp("words"), WORDS_MODEL), arguments=arguments)


def test_streams_over_grpc_and_http(words):
    text = "eins zwei dreißig 四"
    assert stream(words, text) == text.split()
    events = [json.loads(line[6:]) for line in post(words, "generate_stream", text).split("\n\n") if line]
    assert [event["text_output"] for event in events] == text.split()
    assert json.loads(post(words, "generate", "one"))["text_output"] == "one"


def test_runs_the_code_of_this_process(words):
    assert stream(words, "which code?") == [nanoflow_backend.__file__]


def test_explicit_mode_loads_and_unloads(words):
    with tritonclient.grpc.InferenceServerClient(words.grpc_url) as client:
        client.unload_model("words")
        with pytest.raises(InferenceServerException, match="words"):
            stream(words, "gone")
        client.load_model("words")
    assert stream(words, "back again") == ["back", "again"]


def test_listens_on_loopback_only(words):
    listening = []  # (port, address): hexadecimal, addresses in host byte order
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for _, local, _, state, *_ in map(str.split, Path(table).read_text().splitlines()[1:]):
            if state == "0A":  # TCP_LISTEN
                address, port = local.split(":")
                listening.append((int(port, 16), address))
    for url in (words.http_url, words.grpc_url, words.metrics_url):
        addresses = {address for port, address in listening if port == int(url.split(":")[1])}
        assert addresses
        assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and mapped into IPv6


def test_stop_leaves_nothing_and_spares_other_servers(
    words, server, process_tree, tmp_path, tmp_path_factory, monkeypatch
):
    folders = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folders))  # of no server but this one
    second = server(repository(tmp_path, WORDS_MODEL))
    assert stream(second, "a b") == ["a", "b"]
    processes = process_tree(second.pid)
    assert {"tritonserver", "triton_python_b"} <= set(processes.values())
    assert shared_memory(second.shm_prefix)
    assert len(list(folders.glob("nanoflow-server-*"))) == 1
    second.stop()
    assert not alive(processes)
    assert not shared_memory(second.shm_prefix)
    assert not list(folders.iterdir())
    for url in (second.http_url, second.grpc_url, second.metrics_url):
        assert_free(url)
    second.stop()
    assert stream(words, "still here") == ["still", "here"]


def test_a_model_that_never_unloads_is_killed_with_its_children(server, process_tree, tmp_path):
    stuck = server(repository(tmp_path, STUCK_MODEL), exit_timeout_s=1)
    processes = process_tree(stuck.pid)
    assert list(processes.values()).count("python3") == 1
    stuck.stop()
    assert not alive(processes)
    assert not shared_memory(stuck.shm_prefix)


def test_a_failing_model_shows_the_end_of_the_log(tmp_path):
    log = tmp_path / "server.log"
    failing = EmbeddedServer(repository(tmp_path / "repository", FAILING_MODEL), log=log)
    with pytest.raises(ServerError, match="layer 7 has no weights") as caught, failing:
        pytest.fail("a server whose model failed was called ready")
    message = str(caught.value)
    assert message.startswith(f"the server ended with status 1 before it was ready; the last lines of its log {log}:\n")
    assert "words/1/model.py(4): initialize\n" in message
    assert message.endswith("failed to load all models")
    assert "layer 7 has no weights" in log.read_text()
    assert not shared_memory(failing.shm_prefix)


def test_a_killed_server_is_noticed(server, process_tree, tmp_path):
    killed = server(repository(tmp_path, WORDS_MODEL))
    processes = process_tree(killed.pid)
    os.kill(next(pid for pid, name in processes.items() if name == "tritonserver"), signal.SIGKILL)
    with pytest.raises(ServerError, match="ended by itself with status 137; the last lines of its log"):
        killed.wait()
    assert not alive(processes)
    assert not shared_memory(killed.shm_prefix)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ends_with_its_parent(how, process_tree, tmp_path):
    parent_code = """
import os, signal, sys, time
from pathlib import Path
from nanoflow_backend.embedded.server import EmbeddedServer
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
with EmbeddedServer(Path(sys.argv[1]), exit_timeout_s=5) as server:
    child = os.fork()  # holds a copy of every pipe of the parent
    if child:
        print(server.pid, child, server.shm_prefix, flush=True)
    time.sleep(1000)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", parent_code, repository(tmp_path, WORDS_MODEL)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # the traceback of KeyboardInterrupt
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    guard, forked, shm_prefix = parent.stdout.readline().split()
    try:
        processes = process_tree(int(guard))
        assert "tritonserver" in processes.values()
        parent.send_signal(how)
        parent.wait()
        until(lambda: not alive(processes))
        assert not shared_memory(shm_prefix)
    finally:
        os.kill(int(forked), signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.parametrize("service", ["http", "grpc", "metrics"])
def test_a_taken_port_is_named_before_anything_starts(service, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = EmbeddedServer(repository(tmp_path, WORDS_MODEL), **{f"{service}_port": port})
        with pytest.raises(ServerError, match=rf"port {port} .*in use.*choose another with --{service}-port"):
            refused.start()
    with pytest.raises(ServerError, match="was not started"):
        refused.wait()


def test_one_port_for_two_services_is_refused(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ServerError, match=f"port {port} .*--metrics-port"):
        EmbeddedServer(repository(tmp_path, WORDS_MODEL), http_port=port, metrics_port=port).start()


def test_numpy_2_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"numpy": "2.4.6"}[name])
    with pytest.raises(ServerError, match=r"numpy 2\.4\.6 .*pip install 'numpy<2'"):
        EmbeddedServer(tmp_path).start()


def test_a_missing_libpython_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(libpython, "LIBPYTHON", "libpython3.99.so.1.0")
    with pytest.raises(ServerError, match=r"apt install libpython3\.99"):
        EmbeddedServer(tmp_path).start()


def test_a_missing_repository_is_named(tmp_path):
    with pytest.raises(ServerError, match="nowhere is not a folder"):
        EmbeddedServer(tmp_path / "nowhere").start()
