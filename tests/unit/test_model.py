"""TritonPythonModel without a server: a stand-in for the stub's module and for the engine process."""

import importlib
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
import tiny_tokenizers

from nanoflow_backend.config import ConfigError
from nanoflow_backend.engine.messages import News, Ready, Refusal
from nanoflow_backend.engine.process import EngineError
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.scheduler.stats import SchedulerStats
from nanoflow_backend.scheduler.waiting_queue import QueueFull
from nanoflow_backend.serving.tensors import OUTPUTS

FOLDER = Path(__file__).parents[2] / "model_repository" / "nanoflow"
STATS = SchedulerStats(*range(len(SchedulerStats.__struct_fields__)))
FINAL = 1


class ResponseSender:
    """The server's end: checks what would hang or crash a real one."""

    def __init__(self):
        self.responses, self.final, self.cancelled, self.slow_s = [], threading.Event(), False, 0.0

    def send(self, response=None, flags=0):
        assert not self.final.is_set(), "the server raises here"
        self.responses.append(response)
        if flags == FINAL:
            self.final.set()

    def is_cancelled(self):
        assert not self.final.is_set(), "the server crashes here"
        time.sleep(self.slow_s)
        assert not self.final.is_set(), "the server crashes here"
        return self.cancelled


class ServerRequest:
    def __init__(self, parameters="", timeout_us=0, **tensors):
        self.tensors = {name: types.SimpleNamespace(as_numpy=lambda v=v: v) for name, v in tensors.items()}
        self.parameters, self.timeout = lambda: parameters, lambda: timeout_us
        self.requested_output_names = lambda: [tensor.name for tensor in OUTPUTS]
        self.sender = ResponseSender()
        self.get_response_sender = lambda: self.sender

    def result(self):
        assert self.sender.final.wait(30), "no final response"
        return self.sender.responses[-1]


def stub_module():
    """triton_python_backend_utils as far as the model uses it."""
    stub = types.ModuleType("triton_python_backend_utils")

    class TritonError:
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "CANCELLED", "INTERNAL"

        def __init__(self, message, code):
            message.encode()  # as the server must
            self.message, self.code = message, code

    class MetricFamily:
        GAUGE = "gauge"

        def __init__(self, name, description, kind):
            raise stub.TritonModelException("metrics not supported")

    stub.TritonError, stub.MetricFamily = TritonError, MetricFamily
    stub.TritonModelException = type("TritonModelException", (Exception,), {})
    stub.InferenceResponse = lambda output_tensors, error=None: types.SimpleNamespace(
        outputs={tensor.name: tensor.value for tensor in output_tensors}, error=error
    )
    stub.Tensor = lambda name, value: types.SimpleNamespace(name=name, value=value)
    stub.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    stub.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    stub.Logger = types.SimpleNamespace(log_info=lambda text: None, log_error=lambda text: None)
    return stub


class FakeEngine:
    """Answers nothing by itself; the test speaks for it."""

    latest = None

    def __init__(self, config, on_news, on_refusal, on_death, host_pid):
        self.config, self.on_refusal, self.on_death = config, on_refusal, on_death
        self.say = lambda *deltas: on_news(News(list(deltas), STATS))
        self.requests, self.cancelled, self.stopped, self.broken = [], [], False, None
        self.full, self.is_ready = None, True
        FakeEngine.latest = self

    def start(self):
        return Ready(vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, description="fake", stats=STATS)

    def check_room(self):
        if self.full:
            raise self.full

    def submit(self, request):
        if self.broken:
            raise self.broken
        self.requests.append(request)

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        self.say(Delta(request_id, [], finish_reason=FinishReason.CANCELLED))

    def stop(self):
        self.stopped = True


@pytest.fixture(scope="module")
def module():
    """nanoflow_backend.serving.model, imported beside the stand-in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", stub_module())
        patch.delitem(sys.modules, "nanoflow_backend.serving.model", raising=False)
        model = importlib.import_module("nanoflow_backend.serving.model")
        patch.setattr(model, "Supervisor", FakeEngine)
        yield model
        sys.modules.pop("nanoflow_backend.serving.model")


@pytest.fixture
def args(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "engine.json").write_text('{"model": "../checkpoint"}')
    (tmp_path / "checkpoint").mkdir()
    tiny_tokenizers.llama3(tmp_path / "checkpoint")
    config = {
        "model_transaction_policy": {"decoupled": True},
        "parameters": {
            "page_tokens": {"string_value": "32"},
            "EXECUTION_ENV_PATH": {"string_value": "/environment"},
        },
    }
    return {
        "model_config": json.dumps(config),
        "model_repository": str(tmp_path),
        "model_version": "1",
        "model_name": "tiny",
    }


@pytest.fixture
def served(module, args):
    model = module.TritonPythonModel()
    model.initialize(args)
    yield model, FakeEngine.latest
    model.finalize()


def text(value):
    return np.array([value.encode()], np.object_)


def last(request_id, token=5):
    return Delta(request_id, [token], finish_reason=FinishReason.LENGTH)


def test_engine_json_and_the_parameters_of_config_pbtxt(served, args):
    _, engine = served
    assert engine.config.model == str(Path(args["model_repository"], "checkpoint"))
    assert engine.config.page_tokens == 32


def test_a_request_and_its_answer(served):
    model, engine = served
    request = ServerRequest('{"max_tokens": 3, "id": "x"}', timeout_us=10_000_000, text_input=text("the dog"))
    before_s = time.monotonic()
    assert model.execute([request]) is None
    (submitted,) = engine.requests
    assert submitted.params.max_tokens == 3
    assert 9 < submitted.deadline - before_s < 11
    engine.say(Delta(submitted.id, [5]), Delta(12345, [6]))
    engine.say(last(submitted.id))
    response = request.result()
    assert response.error is None
    assert response.outputs["text_output"][0].startswith(b"the dog")
    assert len(request.sender.responses) == 1


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (ServerRequest(), "INVALID_ARG", "text_input, input_ids: expected one"),
        (ServerRequest("{", text_input=text("a")), "INTERNAL", "JSONDecodeError"),
        (ServerRequest('{"\\ud800": 1}', text_input=text("a")), "INVALID_ARG", "\\ud800: unknown"),
    ],
)
def test_a_bad_request_does_not_reach_the_engine(served, request_, code, message):
    model, engine = served
    good = ServerRequest(text_input=text("a"))
    model.execute([request_, good])
    assert request_.result().error.code == code
    assert message in request_.result().error.message
    engine.say(last(engine.requests[0].id))
    assert good.result().error is None


@pytest.mark.parametrize(("overloaded", "code"), [(True, "UNAVAILABLE"), (False, "INVALID_ARG")])
def test_a_refusal_has_its_code(served, overloaded, code):
    model, engine = served
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    engine.on_refusal(Refusal(engine.requests[0].id, "prompt: too long", overloaded))
    error = request.result().error
    assert (error.code, error.message) == (code, "prompt: too long")


@pytest.mark.parametrize(("error", "code"), [(EngineError("gone"), "UNAVAILABLE"), (OverflowError("!"), "INTERNAL")])
def test_what_the_engine_cannot_take_is_answered_once(served, error, code):
    model, engine = served
    engine.broken = error
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    assert request.result().error.code == code
    engine.broken = None


def test_death_fails_what_runs_and_not_what_comes_after_a_restart(served):
    model, engine = served
    requests = [ServerRequest(text_input=text("a")) for _ in range(9)]
    model.execute(requests[:8])
    engine.on_death("process 7 ended with SIGKILL")
    for request in requests[:8]:
        assert request.result().error.code == "UNAVAILABLE"
        assert "process 7 ended with SIGKILL" in request.result().error.message
    model.execute(requests[8:])
    engine.say(last(engine.requests[8].id))
    assert requests[8].result().error is None


@pytest.mark.parametrize("why", [QueueFull(7), EngineError("the engine is gone: restart 1 of 5 is under way")])
def test_what_is_refused_at_the_door_costs_no_work(module, served, why, monkeypatch):
    model, engine = served
    monkeypatch.setattr(module.Call, "parse", lambda *_: 1 // 0)
    engine.full = why
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    assert (request.result().error.code, request.result().error.message) == ("UNAVAILABLE", str(why))
    assert not engine.requests


def test_the_model_is_ready_when_its_engine_is(served):
    model, engine = served
    assert model.is_ready() is True
    engine.is_ready = False
    assert model.is_ready() is False


def test_a_request_that_waited_too_long_is_unavailable(served):
    model, engine = served
    request = ServerRequest('{"queue_timeout": 5000000}', text_input=text("a"))
    before_s = time.monotonic()
    model.execute([request])
    (submitted,) = engine.requests
    assert submitted.deadline is None
    assert 4 < submitted.queue_deadline - before_s < 6
    engine.say(Delta(submitted.id, [], finish_reason=FinishReason.QUEUE_TIMEOUT))
    assert request.result().error.code == "UNAVAILABLE"
    assert request.result().error.message == "queue_timeout: still waiting 5000000 us after the request came"


def test_an_abandoned_request_is_cancelled(served):
    model, engine = served
    requests = [ServerRequest(text_input=text("a")) for _ in range(3)]
    model.execute(requests)
    requests[1].sender.cancelled = True
    assert requests[1].result().error.code == "CANCELLED"
    assert set(engine.cancelled) == {engine.requests[1].id}
    assert not requests[0].sender.final.is_set()


def test_nobody_asks_for_cancellation_beside_the_final_response(module, served):
    """The stand-in asserts it. Here the question takes long, and final responses go out while it is asked."""
    model, engine = served
    requests = [ServerRequest(text_input=text("a")) for _ in range(40)]
    for request in requests:
        request.sender.slow_s = 0.002
    model.execute(requests)
    failed = []
    asking = threading.Thread(target=lambda: [_attempt(model._cancel_abandoned, failed) for _ in range(5)])
    asking.start()
    for submitted in reversed(engine.requests):  # asked from the front, ended from the back
        engine.say(last(submitted.id))
        time.sleep(0.001)
    asking.join()
    assert not failed
    assert all(request.result().error is None for request in requests)


def _attempt(action, failed):
    try:
        action()
    except AssertionError as error:
        failed.append(error)


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


def test_a_model_that_is_not_decoupled_is_refused(module, args):
    args["model_config"] = json.dumps({"model_transaction_policy": {"decoupled": False}})
    with pytest.raises(ValueError, match=r"config\.pbtxt: expected .*decoupled: true"):
        module.TritonPythonModel().initialize(args)


def test_an_unknown_parameter_of_config_pbtxt_is_named(module, args):
    config = json.loads(args["model_config"])
    config["parameters"]["page_size"] = {"string_value": "16"}
    args["model_config"] = json.dumps(config)
    with pytest.raises(ConfigError, match="page_size"):
        module.TritonPythonModel().initialize(args)


def test_numpy_2_is_refused_by_an_old_server(module, args, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.4.6")
    with pytest.raises(RuntimeError, match=r"numpy 2\.4\.6 does not work with this server.*install 'numpy<2'"):
        module.TritonPythonModel().initialize(args)
    monkeypatch.setattr(module.pb_utils, "InferenceResponse", lambda output_tensors, error=None, parameters=None: None)
    model = module.TritonPythonModel()
    model.initialize(args)
    model.finalize()


def test_the_stub_stays_free_of_torch(tmp_path):
    """All that model.py of the drop-in folder imports, in a process of its own, where torch cannot be imported."""
    (tmp_path / "triton_python_backend_utils.py").touch()
    shutil.copy(FOLDER / "1" / "model.py", tmp_path / "model.py")
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    code = f"import sys; sys.path[:0] = {path!r}; sys.modules['torch'] = None; import model; model.TritonPythonModel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
