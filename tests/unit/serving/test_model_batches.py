"""TritonPythonModel without a server: several prompts of one request are answered together, or fail together."""

import msgspec
import numpy as np
import pytest
from support.serving.fake_engine import FLAG, last, text
from support.waiting import until

from benchmarks.stress.stub_backend import ServerRequest
from nanoflow_backend.process.engine_process import EngineError
from nanoflow_backend.process.messages import Refusal
from nanoflow_backend.scheduler.batch import Delta


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


def test_prompts_of_one_request_reach_the_engine_together(served):
    model, engine = served
    model.execute([ServerRequest(prompts=np.array([b"a", b"b", b"c"], np.object_))])
    assert engine.submissions == [3]


@pytest.mark.parametrize(
    "tensors",
    [
        {"prompts": np.array([b"a"] * 3, np.object_)},
        {"input_ids": np.array([5, 6, 7], np.int32), "input_lengths": np.array([1, 1, 1])},
    ],
    ids=["prompts", "input_lengths"],
)
def test_more_than_may_ever_wait_is_invalid_before_it_becomes_tokens(served, monkeypatch, tensors):
    model, engine = served
    monkeypatch.setattr(model, "_limits", msgspec.structs.replace(model._limits, max_queue_size=5))
    monkeypatch.setattr(model._tokenizer, "encode", lambda *_, **__: pytest.fail("nothing is tokenised"))
    request = ServerRequest(parameters='{"n": 2, "temperature": 1}', **tensors)
    model.execute([request])
    error = request.result().error
    assert (error.code, error.message) == ("INVALID_ARG", "prompts x n: expected at most 5 (max_queue_size), got 6")
    assert not engine.requests


def test_a_request_that_the_queue_has_no_room_for_leaves_nothing_in_it(served):
    model, engine = served
    engine.room = 3
    refused = ServerRequest(prompts=np.array([b"a", b"b"], np.object_), parameters='{"n": 2, "temperature": 1}')
    model.execute([refused, ServerRequest(text_input=text("a"))])
    assert refused.result().error.code == "UNAVAILABLE"
    assert "room for 3 more, too few for 4 at once: try again later" in refused.result().error.message
    assert engine.submissions == [1]
    assert model._metrics.view().refused["queue_full"] == 1
