"""TritonPythonModel without a server: it is initialized, answers, says whether it is ready, and ends."""

import json
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from support.places import DROP_IN_FOLDER
from support.serving.fake_engine import FLAG, FakeEngine, last, text

from benchmarks.stress.stub_backend import ServerRequest
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.scheduler.batch import Delta


def test_engine_json_and_the_parameters_of_config_pbtxt(served, args):
    _, engine = served
    assert engine.config.model == str(Path(args["model_repository"], "checkpoint"))
    assert engine.config.page_tokens == 32


def test_an_instance_has_its_own_gpus(module, args):
    config = json.loads(args["model_config"])
    config["parameters"]["gpu_device_ids"] = {"string_value": "2;0"}
    config["instance_group"] = [{"name": "tiny_0", "kind": "KIND_MODEL", "count": 2}]
    model = module.TritonPythonModel()
    model.initialize(args | {"model_config": json.dumps(config), "model_instance_name": "tiny_0_1"})
    assert FakeEngine.latest.config.gpus == (0,)
    model.finalize()


def test_a_request_and_its_answer(served):
    model, engine = served
    request = ServerRequest('{"max_tokens": 3, "id": "x"}', timeout_us=10_000_000, text_input=text("the dog"))
    before_s = time.monotonic()
    assert model.execute([request]) is None
    (submitted,) = engine.requests
    assert submitted.params.max_tokens == 3
    assert 9 < submitted.deadline - before_s < 11
    engine.say(Delta(submitted.id, (5,)), Delta(12345, (6,)))
    engine.say(last(submitted.id))
    response = request.result()
    assert response.error is None
    assert response.outputs["text_output"][0].startswith(b"the dog")
    assert len(request.sender.responses) == 1


def test_the_model_is_ready_when_its_engine_is(served):
    model, engine = served
    assert model.is_ready() is True
    engine.is_ready = False
    assert model.is_ready() is False


def test_finalize_answers_what_is_left_and_ends_its_threads(module, args):
    before = set(threading.enumerate())
    model = module.TritonPythonModel()
    model.initialize(args)
    requests = [ServerRequest(text_input=text("a")) for _ in range(5)]
    model.execute(requests)
    model.finalize()
    assert {request.result().error.code for request in requests} == {"UNAVAILABLE"}
    assert FakeEngine.latest.stopped
    assert set(threading.enumerate()) <= before


def test_a_stream_needs_a_decoupled_model(module, args):
    args["model_config"] = json.dumps({"model_transaction_policy": {"decoupled": False}})
    model = module.TritonPythonModel()
    model.initialize(args)
    stream, whole = ServerRequest(text_input=text("a"), stream=FLAG), ServerRequest(text_input=text("a"))
    model.execute([stream, whole])
    assert stream.result().error.code == "INVALID_ARG"
    assert "stream: expected false" in stream.result().error.message
    (submitted,) = FakeEngine.latest.requests
    FakeEngine.latest.say(last(submitted.id))
    assert whole.result().error is None
    model.finalize()


def test_a_model_without_a_policy_is_refused(module, args):
    args["model_config"] = json.dumps({})
    with pytest.raises(ValueError, match=r"config\.pbtxt: expected .*decoupled: true"):
        module.TritonPythonModel().initialize(args)


def test_an_unknown_parameter_of_config_pbtxt_is_named(module, args):
    config = json.loads(args["model_config"])
    config["parameters"]["page_size"] = {"string_value": "16"}
    args["model_config"] = json.dumps(config)
    with pytest.raises(ConfigError, match="page_size"):
        module.TritonPythonModel().initialize(args)


CHANNEL = "nanoflow_backend.serving.response_channel"  # imported with the stub's module that a fixture makes


def test_numpy_2_is_refused_by_an_old_server(module, args, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.4.6")
    sys.modules[CHANNEL].has_response_parameters.cache_clear()
    with pytest.raises(RuntimeError, match=r"numpy 2\.4\.6 does not work with this server.*install 'numpy<2'"):
        module.TritonPythonModel().initialize(args)
    sys.modules[CHANNEL].has_response_parameters.cache_clear()
    monkeypatch.setattr(module.pb_utils, "InferenceResponse", lambda output_tensors, error=None, parameters=None: None)
    model = module.TritonPythonModel()
    model.initialize(args)
    model.finalize()
    sys.modules[CHANNEL].has_response_parameters.cache_clear()


@pytest.mark.parametrize("new_server", [True, False])
def test_parameters_of_responses_where_the_server_has_them(module, served, monkeypatch, new_server):
    sys.modules[CHANNEL].has_response_parameters.cache_clear()
    plain = module.pb_utils.InferenceResponse
    if new_server:

        def response(output_tensors, error=None, parameters=None):
            return types.SimpleNamespace(**vars(plain(output_tensors, error)), parameters=parameters)

        monkeypatch.setattr(module.pb_utils, "InferenceResponse", response)
    model, engine = served
    requests = [
        ServerRequest(text_input=text("a")),
        ServerRequest(prompts=np.array([b"a", b"b"], np.object_), stream=FLAG),
        ServerRequest(prompts=np.array([b"a", b"b"], np.object_)),
    ]
    model.execute(requests)
    engine.say(*(last(submitted.id) for submitted in engine.requests))
    one, streamed, gathered = [request.result() for request in requests]
    sys.modules[CHANNEL].has_response_parameters.cache_clear()
    if new_server:
        for response in (one, streamed):
            assert (response.parameters["finish_reason"], response.parameters["total_output_tokens"]) == ("length", 1)
        assert not gathered.parameters
    assert {response.error for response in (one, streamed, gathered)} == {None}


def test_the_stub_stays_free_of_torch(tmp_path):
    """All that model.py of the drop-in folder imports, in a process of its own, where torch cannot be imported."""
    (tmp_path / "triton_python_backend_utils.py").touch()
    shutil.copy(DROP_IN_FOLDER / "1" / "model.py", tmp_path / "model.py")
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    code = f"import sys; sys.path[:0] = {path!r}; sys.modules['torch'] = None; import model; model.TritonPythonModel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
