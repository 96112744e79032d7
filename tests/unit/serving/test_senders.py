"""Replies on the threads of the senders: in order, once, and none held up by another."""

import threading
import time

import numpy as np
import pytest
from support.serving.conversation import TEXT, Client, Conversation, deltas

from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Delta
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.senders import Senders


class Crowd:
    """Conversations behind Senders."""

    def __init__(self, conversations, threads=3):
        self.talks = dict(enumerate(conversations))
        self.senders = Senders(threads)
        for request_id, talk in self.talks.items():
            self.senders.add(Request(request_id, [5], SamplingParams()), talk.reply)

    def stop(self):
        self.senders.stop(timeout_s=30)


def test_many_streams_in_order_each_on_one_thread(tokenizer):
    ids = tokenizer.encode(TEXT)[1:]
    crowd = Crowd(Conversation(tokenizer, stream=n % 3 > 0) for n in range(40))
    for step in zip(*(deltas(ids, request_id) for request_id in crowd.talks), strict=True):
        crowd.senders.file(step)
    crowd.stop()
    for talk in crowd.talks.values():
        assert "".join(talk.client.sent("text_output")) == TEXT
        assert talk.client.finals == 1
        assert len(talk.client.threads) == 1
    assert len(set().union(*(talk.client.threads for talk in crowd.talks.values()))) == 3
    assert crowd.senders.live() == []


def test_a_slow_client_gets_fewer_and_larger_responses(tokenizer):
    released = threading.Event()

    class Slow(Client):
        def send(self, tensors, final, parameters):
            super().send(tensors, final, parameters)
            assert released.wait(30)

    outputs = ["output_ids", "num_output_tokens"]
    crowd = Crowd([Conversation(tokenizer, outputs=outputs, client=Slow())], threads=1)
    crowd.senders.file([Delta(0, (0,))])
    client = crowd.talks[0].client
    while not client.responses:  # the sender is now inside the first response
        time.sleep(0.001)
    for token in range(1, 100):
        crowd.senders.file([Delta(0, (token,))])
    released.set()
    while len(client.responses) < 2:
        time.sleep(0.001)
    crowd.senders.file(deltas([100]))
    crowd.stop()
    assert client.sent("output_ids") == [[0], list(range(1, 100)), [100]]
    assert (client.finals, client.failure) == (1, None)


def test_failures_reach_their_request_and_closing_reaches_all(tokenizer):
    crowd = Crowd(Conversation(tokenizer) for _ in range(6))
    crowd.senders.fail(2, Failure("INVALID_ARG", "prompt: too long"))
    crowd.senders.fail(99, Failure("INVALID_ARG", "nobody's"))
    crowd.senders.file(deltas([5, 6], request_id=4))
    gone = Failure("UNAVAILABLE", "the engine is gone")
    while len(crowd.senders.live()) > 4:
        time.sleep(0.001)
    crowd.senders.close(gone)
    with pytest.raises(Failure, match="gone"):
        crowd.senders.add(Request(7, [5], SamplingParams()), crowd.talks[0].reply)
    crowd.stop()
    outcomes = {n: talk.client.failure and talk.client.failure.message for n, talk in crowd.talks.items()}
    assert outcomes == dict.fromkeys((0, 1, 3, 5), gone.message) | {2: "prompt: too long", 4: None}
    assert all(talk.client.finals == 1 for talk in crowd.talks.values())


def test_one_final_response_under_random_news(tokenizer):
    """Ends, failures, late news, closing and broken clients, in every mixture, from several threads."""
    rng = np.random.default_rng(5)
    ids = tokenizer.encode(TEXT)[1:]
    for _ in range(60):
        breaks = rng.choice([None, 0, 1, 4], size=12)
        crowd = Crowd(
            (
                Conversation(
                    tokenizer,
                    stream=bool(rng.integers(2)),
                    stop=(" fox",) if rng.integers(2) else (),
                    client=Client(broken_after=broken),
                )
                for broken in breaks
            ),
            threads=int(rng.integers(1, 4)),
        )
        close = threading.Thread(target=crowd.senders.close, args=(Failure("UNAVAILABLE", "gone"),))
        close_at = rng.integers(len(ids) + 1)
        for index, step in enumerate(zip(*(deltas(ids, request_id) for request_id in crowd.talks), strict=True)):
            crowd.senders.file(step)
            crowd.senders.file(step[:3])  # what no request waits for any longer
            if rng.integers(4) == 0:
                crowd.senders.fail(int(rng.integers(12)), Failure("INVALID_ARG", "wrong"))
            if index == close_at:
                close.start()
        if close_at < len(ids):
            close.join()
        crowd.stop()
        assert [talk.client.finals for talk in crowd.talks.values()] == [1] * 12
        assert crowd.senders.live() == []
