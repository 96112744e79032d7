"""TritonPythonModel without a server, before an engine that is stuck: each client is answered in time, once."""

import threading
import time

import numpy as np
import pytest
from msgspec.structs import replace
from support.serving.fake_engine import FLAG, last, text
from support.waiting import until

from benchmarks.stress.stub_backend import ServerRequest
from nanoflow_backend.scheduler.batch import Delta, FinishReason

LATEST_S = 1.0  # after its timeout
MESSAGES = text('[{"role": "user", "content": "dog"}]')


@pytest.fixture
def stuck(served):
    model, engine = served
    engine.stuck = True
    return model, engine


@pytest.fixture
def endless_rendering(served, monkeypatch):
    """Chats are rendered until the test lets them go."""
    released = threading.Event()

    def render(*_):
        assert released.wait(30)
        return "the dog"

    monkeypatch.setattr(served[0]._tokenizer, "apply_chat_template", render)
    yield released
    released.set()


def answered(request, timeout_s):
    """Its failure; it came neither before its time nor too late."""
    begun_s = time.monotonic()
    error = request.result().error
    assert timeout_s <= time.monotonic() - begun_s + 0.05 < timeout_s + LATEST_S
    return error.code, error.message


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        ({"text_input": text("a")}, '{"timeout": 200000}', "timeout: not done 200000 us after"),
        ({"text_input": text("a"), "n": 2}, '{"timeout": 200000}', "timeout: not done 200000 us after"),
        ({"text_input": text("a"), "return_total_time_s": FLAG}, '{"timeout": 200000}', "timeout: not done"),
        ({"prompts": np.array([b"a", b"b"], np.object_)}, '{"timeout": 200000}', "timeout: not done 200000 us after"),
        ({"text_input": text("a")}, '{"queue_timeout": 200000}', "queue_timeout: still waiting 200000 us after"),
        (
            {"text_input": text("a"), "sampling_parameters": text('{"timeout": 200000}')},
            '{"queue_timeout": 900000}',
            "timeout: not done 200000 us after",
        ),
    ],
    ids=["timeout", "sequences", "account", "prompts", "queue timeout", "both"],
)
def test_a_stuck_engine_holds_up_no_client_beyond_its_timeout(stuck, inputs, parameters, message):
    model, engine = stuck
    n = inputs.pop("n", None)
    request = ServerRequest(parameters[:-1] + (f', "n": {n}}}' if n else "}"), **inputs)
    patient = ServerRequest(text_input=text("a"))
    model.execute([request, patient])
    code, said = answered(request, 0.2)
    assert (code, said.startswith(message)) == ("UNAVAILABLE", True), said
    reason = FinishReason.DEADLINE if message.startswith("timeout") else FinishReason.QUEUE_TIMEOUT
    ended = [request.id for request in engine.requests[:-1]]
    assert dict(reversed(engine.cancels)) == dict.fromkeys(ended, reason), "its first word counts"
    assert not patient.sender.final.is_set()


def test_the_engines_own_word_comes_first(served):
    """It ends what is overdue at its next step, and the stub does not say it again."""
    model, engine = served
    request = ServerRequest('{"timeout": 100000}', text_input=text("a"))
    model.execute([request])
    time.sleep(0.15)
    engine.say(last(engine.requests[0].id))
    assert request.result().error is None
    time.sleep(0.5)
    assert engine.cancels == []
    assert len(request.sender.responses) == 1


def test_what_has_begun_is_not_late_to_begin(stuck):
    model, engine = stuck
    request, waiting = (ServerRequest('{"queue_timeout": 100000}', text_input=text("a"), stream=FLAG) for _ in range(2))
    model.execute([request, waiting])
    first = engine.requests[0].id
    engine.begin(first, 12345)
    assert waiting.result().error.message.startswith("queue_timeout")
    time.sleep(0.2)
    assert not request.sender.final.is_set()
    engine.say(last(first))
    assert request.result().error is None


def test_each_request_is_counted_once_whoever_ended_it(stuck):
    """By the engine if it goes on, by the stub if it dies."""
    model, engine = stuck
    late = [ServerRequest('{"timeout": 100000}', text_input=text("a")) for _ in range(3)]
    waiting = ServerRequest('{"queue_timeout": 100000}', text_input=text("a"))
    patient = [ServerRequest(text_input=text("a")) for _ in range(4)]
    model.execute([*late, waiting, *patient])
    for request in (*late, waiting):
        request.result()
    engine.say(Delta(engine.requests[0].id, (), finish_reason=FinishReason.DEADLINE))  # it counts this one itself
    engine.on_death("process 7 was killed: it made no step for 300 s (engine_stall_s)")
    assert {request.result().error.message for request in patient} == {
        "process 7 was killed: it made no step for 300 s (engine_stall_s)"
    }
    refused = model._metrics.view().refused
    assert {reason: number for reason, number in refused.items() if number} == {
        "deadline": 2,
        "queue_timeout": 1,
        "engine_failure": 4,
    }
    engine.on_death("again")
    assert model._metrics.view().refused == refused


def test_invalid_requests_and_cancels_are_answered_at_once_by_a_stuck_engine(stuck):
    model, _ = stuck
    running = ServerRequest(request_id="mine", text_input=text("a"))
    invalid = ServerRequest('{"temperature": -1}', text_input=text("a"))
    cancel = ServerRequest(request_id="mine", cancel=FLAG)
    model.execute([running, invalid, cancel])
    assert invalid.sender.final.is_set()
    assert invalid.result().error.code == "INVALID_ARG"
    assert cancel.result().outputs["num_cancelled"].tolist() == [1]


def test_a_client_that_is_gone_is_told_of_once(stuck):
    """The engine does not read: what is said to it ten times a second would pile up."""
    model, engine = stuck
    request = ServerRequest(text_input=text("a"))
    model.execute([request])
    request.sender.cancelled = True
    until(lambda: engine.cancels)
    time.sleep(0.5)
    assert len(engine.cancels) == 1


def test_a_cancel_that_overtakes_its_request_is_said_again(stuck, monkeypatch):
    model, engine = stuck
    submit = engine.submit

    def slow(*requests):
        model.execute([ServerRequest(request_id="mine", cancel=FLAG)])
        engine.cancels.append("submitted")
        submit(*requests)

    monkeypatch.setattr(engine, "submit", slow)
    model.execute([ServerRequest(request_id="mine", text_input=text("a"))])
    cancelled = (engine.requests[0].id, FinishReason.CANCELLED)
    assert engine.cancels == [cancelled, "submitted", cancelled]


@pytest.mark.parametrize("field", ["timeout", "queue_timeout"])
@pytest.mark.parametrize("place", ["parameters", "sampling_parameters"])
def test_a_chat_is_answered_in_time_while_it_waits_or_is_rendered(served, endless_rendering, field, place):
    model, engine = served
    limit = f'{{"{field}": 300000}}'
    said = (
        ServerRequest(limit, messages=MESSAGES)
        if place == "parameters"
        else ServerRequest(sampling_parameters=text(limit), messages=MESSAGES)
    )
    patient = [ServerRequest(messages=MESSAGES) for _ in range(2)]
    model.execute([said, *patient])  # one of the patient ones waits, for there are two threads
    code, message = answered(said, 0.3)
    assert code == "UNAVAILABLE"
    assert (
        message
        == {
            "timeout": "timeout: not done 300000 us after the request came",
            "queue_timeout": "queue_timeout: still waiting 300000 us after the request came",
        }[field]
    )
    late = ServerRequest(limit, messages=MESSAGES)  # this one waits
    model.execute([late])
    assert answered(late, 0.3) == (code, message)
    endless_rendering.set()
    until(lambda: len(engine.requests) == 2)
    for submitted in engine.requests:
        engine.say(last(submitted.id))
    assert {request.result().error for request in patient} == {None}
    assert len(said.sender.responses) == len(late.sender.responses) == 1
    refused = model._metrics.view().refused
    assert refused["queue_timeout" if field == "queue_timeout" else "deadline"] == 2


def test_the_queue_timeout_of_engine_json_holds_for_chats_too(served, endless_rendering, monkeypatch):
    model, _ = served
    monkeypatch.setattr(model, "_limits", replace(model._limits, max_queue_us=200_000))
    chat = ServerRequest(messages=MESSAGES)
    model.execute([chat])
    assert answered(chat, 0.2)[1].startswith("queue_timeout: still waiting 200000 us")


def test_a_chat_whose_limits_are_wrong_is_refused_at_once(served, endless_rendering):
    model, _ = served
    chat = ServerRequest('{"timeout": -1}', messages=MESSAGES)
    model.execute([chat])
    assert chat.sender.final.is_set()
    assert "timeout: expected an integer" in chat.result().error.message
