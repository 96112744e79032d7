"""TritonPythonModel without a server: a stand-in for the stub's module and for the engine process."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
from waiting import until

from benchmarks.models import tiny_tokenizers
from benchmarks.stress import stub_backend
from benchmarks.stress.stub_backend import ServerRequest
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.process.messages import News, Queue, Ready, Refusal
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull

FOLDER = Path(__file__).parents[3] / "model_repository" / "nanoflow"
READY = Ready(vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, description="fake", queue_room=9)


class FakeEngine:
    """Answers nothing by itself; the test speaks for it."""

    latest = None

    def __init__(self, config, callbacks, host_pid):
        self.config, self.on_refusal = config, callbacks.on_refusal
        self.on_death, self.on_restart = callbacks.on_death, callbacks.on_restart
        self.say = lambda *deltas: callbacks.on_news(News(list(deltas), Queue(0, 9, 0)))
        self.requests, self.cancelled, self.stopped, self.broken = [], [], False, None
        self.full, self.is_ready = None, True
        FakeEngine.latest = self

    def start(self):
        return READY

    def check_room(self):
        if self.full:
            raise self.full

    def submit(self, request):
        if self.broken:
            raise self.broken
        self.requests.append(request)

    def cancel(self, request_id, reason, index=None):
        self.cancelled.append(request_id)
        self.say(Delta(request_id, (), finish_reason=FinishReason.CANCELLED))

    def stop(self):
        self.stopped = True


@pytest.fixture(scope="module")
def module():
    with stub_backend.model_module() as model, pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "Supervisor", FakeEngine)
        yield model


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
        "model_instance_name": "tiny_0_0",
        "model_instance_kind": "MODEL",
        "model_instance_device_id": "0",
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


FLAG = np.array([True])


def text(value):
    return np.array([value.encode()], np.object_)


def last(request_id, token=5):
    return Delta(request_id, (token,), finish_reason=FinishReason.LENGTH)


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


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (ServerRequest(), "INVALID_ARG", "text_input, prompts, input_ids, messages: expected one"),
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


def test_prompts_of_one_request_come_back_in_their_order(served):
    model, engine = served
    request = ServerRequest(prompts=np.array([b"a dog", b"the fox"], np.object_), return_num_output_tokens=FLAG)
    model.execute([request])
    first, second = engine.requests
    assert first.prompt != second.prompt
    engine.say(last(second.id))
    engine.say(Delta(first.id, (5, 6)))
    assert not request.sender.responses
    engine.say(last(first.id))
    outputs = request.result().outputs
    assert len(request.sender.responses) == 1
    assert [text[:5] for text in outputs["text_output"]] == [b"a dog", b"the f"]
    assert outputs["num_output_tokens"].tolist() == [3, 1]
    assert outputs["batch_index"].tolist() == [0, 1]


def test_a_stream_of_prompts_says_whose_each_response_is(served):
    model, engine = served
    request = ServerRequest(input_ids=np.array([5, 6, 7], np.int32), input_lengths=np.array([1, 2]), stream=FLAG)
    model.execute([request])
    assert [submitted.prompt for submitted in engine.requests] == [[5], [6, 7]]
    first, second = engine.requests
    for delta in (Delta(second.id, (8,)), last(second.id, token=9), last(first.id, token=10)):
        before = len(request.sender.responses)
        engine.say(delta)
        until(lambda before=before: len(request.sender.responses) > before)
    request.result()
    seen = [(r.outputs["batch_index"].tolist(), r.outputs["output_ids"].tolist()) for r in request.sender.responses]
    assert seen == [([1], [8]), ([1], [9]), ([0], [10])]


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_of_one_prompt_ends_them_all(served, stream):
    model, engine = served
    request = ServerRequest(prompts=np.array([b"a", b"b", b"c"], np.object_), stream=np.array([stream]))
    model.execute([request])
    ids = [submitted.id for submitted in engine.requests]
    engine.on_refusal(Refusal(ids[1], "the queue is full", "queue_full"))
    assert request.result().error.code == "UNAVAILABLE"
    until(lambda: {ids[0], ids[2]} <= set(engine.cancelled))
    until(lambda: not model._senders.live())


def test_death_fails_a_batch_once(served):
    model, engine = served
    requests = [ServerRequest(prompts=np.array([b"a", b"b"], np.object_)) for _ in range(2)]
    model.execute(requests[:1])
    engine.on_death("process 7 ended")
    engine.broken = EngineError("the engine is gone")
    model.execute(requests[1:])
    assert [request.result().error.code for request in requests] == ["UNAVAILABLE"] * 2


def test_cancel_by_request_id(served):
    model, engine = served
    requests = [ServerRequest(request_id=name, text_input=text("a")) for name in ("x", "y", "x", "")]
    requests.append(ServerRequest(request_id="x", prompts=np.array([b"a", b"b"], np.object_)))
    cancel = ServerRequest(request_id="x", cancel=FLAG)
    model.execute([*requests, cancel])
    assert cancel.result().outputs["num_cancelled"].tolist() == [4]
    assert {request.result().error.code for request in (requests[0], requests[2], requests[4])} == {"CANCELLED"}
    assert len(engine.cancelled) == 4
    until(lambda: len(model._senders.live()) == 2)
    again = ServerRequest(request_id="x", cancel=FLAG)
    model.execute([again])
    assert again.result().outputs["num_cancelled"].tolist() == [0]


def test_other_requests_come_in_while_a_chat_is_rendered(served, monkeypatch):
    model, engine = served
    begun, released = threading.Event(), threading.Event()

    def render(*_):
        begun.set()
        assert released.wait(30)
        return "the dog"

    monkeypatch.setattr(model._tokenizer, "apply_chat_template", render)
    messages = text('[{"role": "user", "content": "dog"}]')
    chat, given_up = (ServerRequest(request_id=name, messages=messages) for name in ("chat", "given up"))
    model.execute([chat, given_up])
    assert begun.wait(30)
    model.execute([ServerRequest(text_input=text("quick"))])
    assert [engine.requests[0].prompt] == [model._tokenizer.encode("quick")]
    cancel = ServerRequest(request_id="given up", cancel=FLAG)
    model.execute([cancel])
    assert cancel.result().outputs["num_cancelled"].tolist() == [1]
    released.set()
    assert given_up.result().error.code == "CANCELLED"
    until(lambda: len(engine.requests) == 2)
    engine.say(last(engine.requests[1].id))
    assert chat.result().error is None


def test_messages_that_a_template_refuses_are_the_clients_fault(served):
    model, engine = served
    request = ServerRequest(messages=text('[{"role": "user"}]'))
    model.execute([request])
    assert request.result().error.code == "INVALID_ARG"
    assert engine.requests == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ServerRequest(cancel=np.array([True])), "cancel: expected the id of the requests to end"),
        (
            ServerRequest(request_id="x", cancel=np.array([True]), text_input=np.array([b"a"], np.object_)),
            "cancel: expected no other input, got text_input",
        ),
    ],
)
def test_a_cancellation_that_makes_no_sense_is_refused(served, request_, message):
    model, engine = served
    model.execute([request_])
    assert request_.result().error.code == "INVALID_ARG"
    assert message in request_.result().error.message
    assert not engine.requests


@pytest.mark.parametrize(
    ("reason", "code"), [("queue_full", "UNAVAILABLE"), ("invalid", "INVALID_ARG"), ("internal", "INTERNAL")]
)
def test_a_refusal_has_its_code(served, reason, code):
    model, engine = served
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    engine.on_refusal(Refusal(engine.requests[0].id, "prompt: too long", reason))
    error = request.result().error
    assert (error.code, error.message) == (code, "prompt: too long")
    assert model._metrics.view().refused[reason] == 1


@pytest.mark.parametrize(("error", "code"), [(EngineError("gone"), "UNAVAILABLE"), (OverflowError("!"), "INTERNAL")])
def test_what_the_engine_cannot_take_is_answered_once(served, error, code):
    model, engine = served
    engine.broken = error
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    assert request.result().error.code == code
    engine.broken = None


def test_an_error_of_ours_is_logged_without_its_words(module, served, monkeypatch):
    model, engine = served
    engine.broken = KeyError("the secret prompt")
    logged = []
    monkeypatch.setattr(module.pb_utils.Logger, "log_error", logged.append)
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    assert "the secret prompt" in request.result().error.message
    (line,) = logged
    assert ": a request broke: KeyError < submit (test_model.py:" in line
    assert line.startswith("model=tiny instance=tiny_0_0 nanoflow_backend.serving.model: ")
    assert "secret" not in line


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ServerRequest(text_input=text("x" * 5000)), r"text_input: expected at most \d+ bytes, got 5000"),
        (ServerRequest(text_input=text("x"), stop=np.array([b"x"] * 5000, np.object_)), "stop: expected at most 4096"),
        (ServerRequest(text_input=text("x"), stop=np.array([b"x"] * 300, np.object_)), "stop: expected at most 256"),
        (ServerRequest(text_input=text("x"), stop=text("x" * 2000)), "stop: .* of at most 1024 characters"),
        (ServerRequest(text_input=text("x"), sampling_parameters=text("[" * 10**6)), "not valid JSON"),
        (ServerRequest(text_input=text("x"), sampling_parameters=text(f'{{"seed": {"9" * 9999}}}')), "not valid JSON"),
        (ServerRequest(input_ids=np.ones(2**20 + 1, np.int32)), "input_ids: expected at most 1048576 elements"),
        (
            ServerRequest(f'{{"x": "{"y" * 2**20}"}}', text_input=text("x")),
            "parameters: expected at most 1048576 bytes",
        ),
        (ServerRequest(sampling_parameters=text(" " * 2**22 + "{}")), "sampling_parameters: expected at most 4194304"),
        (
            ServerRequest(sampling_parameters=text(" " * 2**21), stop=text(" " * 2**21), text_input=text("x")),
            "texts: expected at most 4194304 bytes in a request, got 4194305",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "request",
)
def test_what_is_too_large_is_refused(served, request_, message):
    model, engine = served
    model.execute([request_])
    error = request_.result().error
    assert error.code == "INVALID_ARG"
    assert re.search(message, error.message)
    assert len(error.message) < 2500
    assert not engine.requests


def test_death_fails_what_runs_and_not_what_comes_after_a_restart(served):
    model, engine = served
    requests = [ServerRequest(text_input=text("a")) for _ in range(9)]
    model.execute(requests[:8])
    engine.on_death("process 7 ended with SIGKILL")
    for request in requests[:8]:
        assert request.result().error.code == "UNAVAILABLE"
        assert "process 7 ended with SIGKILL" in request.result().error.message
    view = model._metrics.view()
    assert not view.up
    assert view.refused["engine_failure"] == 8
    engine.on_restart(engine.start())
    model.execute(requests[8:])
    engine.say(last(engine.requests[8].id))
    assert requests[8].result().error is None
    view = model._metrics.view()
    assert (view.up, view.restarts) == (True, 1)


@pytest.mark.parametrize("why", [QueueFull(7), EngineError("the engine is gone: restart 1 of 5 is under way")])
def test_what_is_refused_at_the_door_costs_no_work(module, served, why, monkeypatch):
    model, engine = served
    monkeypatch.setattr(module.Call, "parse", lambda *_: 1 // 0)
    engine.full = why
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    assert (request.result().error.code, request.result().error.message) == ("UNAVAILABLE", str(why))
    assert not engine.requests


def test_a_full_queue_refuses_no_cancellation(served):
    model, engine = served
    running = ServerRequest(text_input=text("a"), request_id="mine")
    model.execute([running])
    engine.full = QueueFull(7)
    refused, cancellation = (
        ServerRequest(text_input=text("a")),
        ServerRequest(cancel=np.array([True]), request_id="mine"),
    )
    model.execute([refused, cancellation])
    assert refused.result().error.code == "UNAVAILABLE"
    assert cancellation.result().error is None
    assert engine.cancelled == [engine.requests[0].id]
    assert model._metrics.view().refused["queue_full"] == 1


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
    engine.say(Delta(submitted.id, (), finish_reason=FinishReason.QUEUE_TIMEOUT))
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


def test_numpy_2_is_refused_by_an_old_server(module, args, monkeypatch):
    monkeypatch.setattr(np, "__version__", "2.4.6")
    module.has_response_parameters.cache_clear()
    with pytest.raises(RuntimeError, match=r"numpy 2\.4\.6 does not work with this server.*install 'numpy<2'"):
        module.TritonPythonModel().initialize(args)
    module.has_response_parameters.cache_clear()
    monkeypatch.setattr(module.pb_utils, "InferenceResponse", lambda output_tensors, error=None, parameters=None: None)
    model = module.TritonPythonModel()
    model.initialize(args)
    model.finalize()
    module.has_response_parameters.cache_clear()


@pytest.mark.parametrize("new_server", [True, False])
def test_parameters_of_responses_where_the_server_has_them(module, served, monkeypatch, new_server):
    module.has_response_parameters.cache_clear()
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
    module.has_response_parameters.cache_clear()
    if new_server:
        for response in (one, streamed):
            assert (response.parameters["finish_reason"], response.parameters["total_output_tokens"]) == ("length", 1)
        assert not gathered.parameters
    assert {response.error for response in (one, streamed, gathered)} == {None}


def test_the_stub_stays_free_of_torch(tmp_path):
    """All that model.py of the drop-in folder imports, in a process of its own, where torch cannot be imported."""
    (tmp_path / "triton_python_backend_utils.py").touch()
    shutil.copy(FOLDER / "1" / "model.py", tmp_path / "model.py")
    path = [str(tmp_path), *(entry for entry in sys.path if entry)]
    code = f"import sys; sys.path[:0] = {path!r}; sys.modules['torch'] = None; import model; model.TritonPythonModel"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
