"""TritonPythonModel without a server: what is refused, and what breaks, is answered once with its code."""

import re
import time

import msgspec
import numpy as np
import pytest
from support.serving.fake_engine import last, text

from benchmarks.stress.stub_backend import ServerRequest
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.process.messages import Refusal
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.scheduler.waiting_queue import QueueFull


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        (ServerRequest(), "INVALID_ARG", "text_input, prompts, input_ids, messages: expected one"),
        (ServerRequest(image=text("x"), text_input=text("a")), "INVALID_ARG", "image: not implemented; expected"),
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


def test_messages_that_a_template_refuses_are_the_clients_fault(served):
    model, engine = served
    request = ServerRequest(messages=text('[{"role": "user"}]'))
    model.execute([request])
    assert request.result().error.code == "INVALID_ARG"
    assert engine.requests == []


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
    assert ": a request broke: KeyError < submit (fake_engine.py:" in line
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
        (ServerRequest(sampling_parameters=text(" " * 2**20 + "{}")), "sampling_parameters: expected at most 1048576"),
        (ServerRequest(tools=text(" " * 2**22 + "[]"), messages=text("[]")), "tools: expected at most 4194304 bytes"),
        (
            ServerRequest(tools=text(" " * 2**21), stop=text(" " * 2**21), text_input=text("x")),
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


def test_a_restarted_engine_may_have_another_cache(served):
    model, engine = served
    engine.on_restart(msgspec.structs.replace(engine.start(), num_pages=1))
    requests = [ServerRequest(input_ids=np.array(ids, np.int32)) for ids in ([5] * 4, [5] * 5)]
    model.execute(requests)
    assert "expected at most 4 tokens" in requests[1].result().error.message
    assert [request.prompt for request in engine.requests] == [[5] * 4]


@pytest.mark.parametrize("why", [QueueFull(7), EngineError("the engine is gone: restart 1 of 5 is under way")])
def test_what_is_refused_at_the_door_costs_no_work(module, served, why, monkeypatch):
    model, engine = served
    monkeypatch.setattr(module.Call, "parse", lambda *_: 1 // 0)
    engine.full = why
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    assert (request.result().error.code, request.result().error.message) == ("UNAVAILABLE", str(why))
    assert not engine.requests


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
