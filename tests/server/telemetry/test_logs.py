"""Nothing of what a client sends comes up in the logs of server and engine, whatever happens to the request."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from support.places import DEMO_MODEL, ROOT
from support.server.clients import GrpcStream, generate, grpc, post
from tritonclient.utils import InferenceServerException

SECRET = "xylophonic marmalade"
WORDS = SECRET.split()
GREEDY = {"temperature": 0.0, "max_tokens": 8}
# Bodies of `generate`, all of them answered or refused.
REQUESTS = [
    {"text_input": SECRET, **GREEDY},
    {"text_input": SECRET, "stop": [SECRET, "the"], **GREEDY},
    {"text_input": SECRET, "max_tokens": SECRET},
    {"text_input": SECRET, SECRET: 1},
    {"text_input": SECRET, "sampling_parameters": f'{{"{SECRET}'},
    {"text_input": SECRET, "sampling_parameters": json.dumps({"stop": SECRET, SECRET: SECRET})},
    {"text_input": [SECRET, SECRET]},
    {"text_input": SECRET * 100_000},
    {"text_input": SECRET, "priority": SECRET},
    {"text_input": SECRET, "id": SECRET, **GREEDY},
    {"text_input": SECRET, "max_tokens": 2000, "ignore_eos": True, "timeout": 1},
    {SECRET: SECRET},
]


@pytest.fixture(scope="module")
def quiet(server, tmp_path_factory):
    repository = tmp_path_factory.mktemp("repository")
    (repository / "quiet" / "1").mkdir(parents=True)
    (repository / "quiet" / "config.pbtxt").write_text('backend: "nanoflow"\ninstance_group [ { kind: KIND_MODEL } ]\n')
    (repository / "quiet" / "1" / "engine.json").write_text(json.dumps({"model": str(DEMO_MODEL)}))
    log = tmp_path_factory.mktemp("log") / "server.log"
    return server(repository, backends=ROOT / "backends", log=log)


def engine_of(processes):
    (engine,) = (p for p in processes if b"nanoflow_backend.engine.loop" in Path(f"/proc/{p}/cmdline").read_bytes())
    return engine


def test_no_prompt_is_logged(quiet, process_tree):
    assert generate(quiet.http_url, "quiet", **REQUESTS[0])["text_output"].startswith(SECRET)
    for body in REQUESTS[1:]:
        post(quiet.http_url, "quiet", "generate", body)
        post(quiet.http_url, "quiet", "generate_stream", body)
    post(quiet.http_url, "quiet", "generate", SECRET.encode())
    for text in (b"\xff" + SECRET.encode(), SECRET.encode() + b"\xed\xa0\x80"):
        with pytest.raises(InferenceServerException):
            grpc(quiet.grpc_url, "quiet", text_input=text)
    long = {"stream": True, "sampling_parameters": json.dumps({"max_tokens": 2000, "ignore_eos": True, "stop": SECRET})}
    cancelled = GrpcStream(quiet.grpc_url, "quiet", text_input=SECRET, **long)
    next(iter(cancelled))
    cancelled.close(cancel=True)
    doomed = GrpcStream(quiet.grpc_url, "quiet", text_input=SECRET, **long)
    next(iter(doomed))
    os.kill(engine_of(process_tree(quiet.pid)), signal.SIGKILL)
    with contextlib.closing(doomed), pytest.raises(InferenceServerException):
        list(doomed)
    quiet.stop()
    log = quiet.log.read_text()
    assert "SIGKILL" in log
    assert not [line for line in log.splitlines() if any(word in line for word in WORDS)]
