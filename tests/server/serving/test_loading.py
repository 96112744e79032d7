"""Models are loaded, unloaded, followed by another engine, or say what is wrong with their folder."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
import tritonclient.grpc
from support.server.clients import GrpcStream, generate, grpc, metrics, post
from support.server.requests import GREEDY, A, refused
from support.waiting import until
from tritonclient.utils import InferenceServerException

from benchmarks.server import add_model

MINIMAL_CONFIG = 'backend: "python"\ninstance_group [ { kind: KIND_MODEL } ]\n'


def loader(served):
    return contextlib.closing(tritonclient.grpc.InferenceServerClient(served.grpc_url))


def test_unloading_waits_for_streams_and_ends_the_engine(served, process_tree, checkpoint, prompts, expected):
    add_model(served.model_repository, checkpoint, name="passing")
    with loader(served) as client:
        before = process_tree(served.pid)
        client.load_model("passing")
        stream = GrpcStream(
            served.grpc_url, "passing", text_input=prompts[0], stream=True, sampling_parameters=json.dumps(GREEDY)
        )
        responses = iter(stream)
        text = next(responses)["text_output"]
        client.unload_model("passing")
        text += "".join(response["text_output"] for response in responses)
        assert text == expected[0].text
        stream.close()
        until(lambda: process_tree(served.pid).keys() <= before.keys())


def test_a_killed_engine_is_said_and_followed_by_another(served, process_tree, checkpoint, prompts):
    add_model(served.model_repository, checkpoint, name="doomed", max_engine_restarts=1)

    def engine_pid():
        """Of the model's engine, where there is one."""
        new = process_tree(served.pid).keys() - before.keys()
        return next((pid for pid in new if b"nanoflow_backend.engine.loop" in cmdline(pid)), None)

    with loader(served) as client:
        before = process_tree(served.pid)
        client.load_model("doomed")
        engine = engine_pid()
        endless = {"max_tokens": 4000, "ignore_eos": True}  # until the kill
        long = {"stream": True, "sampling_parameters": json.dumps(endless)}
        streams = [GrpcStream(served.grpc_url, "doomed", text_input=prompt, **long) for prompt in prompts[:8]]
        waiting = threading.Thread(
            target=lambda: posted.append(post(served.http_url, "doomed", "generate", {**A, **endless}))
        )
        posted = []
        waiting.start()
        for stream in streams:
            next(iter(stream))
        until(lambda: metrics(served.metrics_url, "doomed")["nanoflow_num_requests_running"] == 9)
        os.kill(engine, signal.SIGKILL)
        for stream in streams:
            with refused(f"the engine is gone: process {engine} ended with SIGKILL; restart 1 of 1 is under way"):
                list(stream)
            stream.close()
        waiting.join(60)
        assert posted[0][0] == 400
        assert "ended with SIGKILL" in posted[0][1]
        with refused("ended with SIGKILL; restart 1 of 1 is under way: try again later"):
            grpc(served.grpc_url, "doomed", **A)
        until(lambda: post(served.http_url, "doomed", "generate", A)[0] == 200)
        until(lambda: metrics(served.metrics_url, "doomed")["nanoflow_kv_cache_usage_perc"] == 0)
        os.kill(engine_pid(), signal.SIGKILL)
        until(lambda: "reload the model" in post(served.http_url, "doomed", "generate", A)[1])
        assert engine_pid() is None
        client.unload_model("doomed")
        until(lambda: process_tree(served.pid).keys() <= before.keys())
        client.load_model("doomed")
        assert generate(served.http_url, "doomed", **A)
        client.unload_model("doomed")
        until(lambda: process_tree(served.pid).keys() <= before.keys())


def cmdline(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def break_json(folder):
    (folder / "1" / "engine.json").write_text('{"model": ')


def misspell(folder):
    (folder / "1" / "engine.json").write_text('{"model": "x", "page_size": 16}')


def no_weights(folder):
    (folder / "empty").mkdir()
    shutil.copy(Path(json.loads((folder / "1" / "engine.json").read_text())["model"], "config.json"), folder / "empty")
    (folder / "1" / "engine.json").write_text('{"model": "../empty"}')


def too_large(folder):
    engine = json.loads((folder / "1" / "engine.json").read_text())
    (folder / "1" / "engine.json").write_text(json.dumps({**engine, "kv_cache_tokens": 2 * 10**9}))


def no_folder(folder):
    (folder / "1" / "engine.json").write_text('{"model": "../nowhere"}')


def bad_parameter(folder):
    config = (folder / "config.pbtxt").read_text()
    parameter = 'parameters { key: "page_tokens" value { string_value: "none" } }\n'
    (folder / "config.pbtxt").write_text(config + parameter)


def no_policy(folder):
    config = (folder / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config.replace("model_transaction_policy { decoupled: true }\n", ""))


BROKEN = {
    break_json: r"engine\.json: not valid JSON",
    misspell: r"engine\.json: .*unknown field `page_size`",
    no_weights: r"/empty: .*safetensors",
    too_large: r"kv_cache_tokens: 20+ tokens take .* GiB beside weights of .* GiB of memory are free on cpu: .* most",
    no_folder: r"/nowhere: there is no such folder",
    bad_parameter: r"engine\.json: Expected `int \| null`, got `str` - at `\$\.page_tokens`",
    no_policy: r"config\.pbtxt: expected model_transaction_policy \{ decoupled: true \}",
}


@pytest.mark.parametrize("break_", BROKEN, ids=lambda break_: break_.__name__)
def test_a_broken_folder_says_what_is_wrong(served, checkpoint, break_):
    name = f"broken_{break_.__name__}"
    break_(add_model(served.model_repository, checkpoint, name=name))
    with loader(served) as client, pytest.raises(InferenceServerException, match=BROKEN[break_]):
        client.load_model(name)
    assert re.search(BROKEN[break_], served.log.read_text())
    assert generate(served.http_url, "nanoflow", **A)


def test_a_five_line_folder_is_completed(server, checkpoint, tmp_path, prompts, expected):
    """Auto-completion fills in the tensors; fields of engine.json may stand in config.pbtxt; metrics may be off."""
    parameter = 'parameters { key: "page_tokens" value { string_value: "4" } }\n'
    add_model(tmp_path, checkpoint, name="minimal", config=MINIMAL_CONFIG + parameter)
    small = server(tmp_path, log=tmp_path / "log", exit_timeout_s=30, arguments=["--allow-metrics=false"])
    answer = generate(small.http_url, "minimal", text_input=prompts[0], exclude_input_in_output=True, **GREEDY)
    assert answer["text_output"] == expected[0].text
    assert "pages of 4 tokens" in small.log.read_text()
    small.stop()
