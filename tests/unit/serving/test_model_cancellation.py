"""TritonPythonModel without a server: requests are cancelled by id, or because their client has gone."""

import threading
import time

import numpy as np
import pytest
from support.serving.fake_engine import FLAG, last, text
from support.waiting import until

from benchmarks.stress.stub_backend import ServerRequest
from nanoflow_backend.scheduler.waiting_queue import QueueFull


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


@pytest.mark.parametrize(
    "long",
    [
        {"prompts": np.array([b"dog " * 200] * 30, np.object_)},
        {"text_input": text("dog"), "sampling_parameters": text(" " * 20_000 + "{}")},
        {"text_input": text("dog"), "parameters": " " * 20_000 + "{}"},
    ],
    ids=["prompts", "sampling parameters", "parameters"],
)
def test_other_requests_come_in_while_a_long_one_is_read(served, monkeypatch, module, long):
    model, engine = served
    parse, released = module.Call.parse, threading.Event()

    def slow(*arguments):
        assert threading.current_thread() is threading.main_thread() or released.wait(30)
        return parse(*arguments)

    monkeypatch.setattr(module.Call, "parse", slow)
    request = ServerRequest(**long)
    model.execute([request, ServerRequest(text_input=text("quick"))])
    assert [engine.requests[0].prompt] == [model._tokenizer.encode("quick")]
    released.set()
    assert "prompts" not in long or "in prompt 0" in request.result().error.message
    until(lambda: len(engine.requests) == 2 or "prompts" in long)


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
