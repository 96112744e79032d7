"""Replies: deltas in, tensors out, exactly one final response whatever happens."""

import json
import threading
import time

import numpy as np
import pytest
from msgspec import structs

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs
from nanoflow_backend.serving.call import ALL_OUTPUTS, Call
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.reply import Reply
from nanoflow_backend.serving.senders import Senders
from nanoflow_backend.serving.tensors import ACCOUNT_OUTPUTS, OUTPUTS
from nanoflow_backend.text.tokenizer import Tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. 😀"
DTYPES = {"STRING": np.object_, "INT32": np.int32, "UINT32": np.uint32, "FP32": np.float32}
DECLARED = {t.name: t for t in OUTPUTS}
ACCOUNT = Account(100.0, 100.5, 102.0, 104.0, peak_pages=7, energy_j=12.5)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(tiny_tokenizers.llama3(tmp_path_factory.mktemp("llama3")))


class Client:
    """A channel that keeps what it was sent, checks it against the table, and may be slow, broken or gone."""

    def __init__(self, delay_s=0.0, broken_after=None):
        self.delay_s, self.broken_after = delay_s, broken_after
        self.whole, self.responses, self.finals, self.failure, self.threads = [], [], 0, None, set()

    def send(self, tensors, final, parameters):
        assert not self.finals, "a response after the final one"
        if self.broken_after is not None and len(self.responses) >= self.broken_after:
            raise RuntimeError("shared memory is full")
        self.threads.add(threading.get_ident())
        time.sleep(self.delay_s)
        assert bool(parameters) <= final
        self.parameters = parameters
        for name, value in tensors.items():
            declared = DECLARED[name]
            assert value.dtype == DTYPES[declared.type]
            assert value.ndim == len(declared.dims)
            assert declared.dims[0] in (-1, value.size)
        self.whole.append(tensors)
        self.responses.append({n: v[0].decode() if v.dtype == np.object_ else v.tolist() for n, v in tensors.items()})
        self.finals += final

    def fail(self, failure):
        assert not self.finals, "a response after the final one"
        self.failure = failure
        self.finals += 1

    def is_cancelled(self):
        return False

    def sent(self, name):
        return [response[name] for response in self.responses]


class Conversation:
    """A reply with what it talks to."""

    def __init__(
        self, tokenizer, *, stream=True, shown_prompt="", outputs=("text_output",), client=None, trace=None, **params
    ):
        self.client = client or Client()
        self.reasons = []
        self.call = Call(
            prompt=[1, 2, 3],
            params=SamplingParams(max_tokens=1000, **params),
            stream=stream,
            shown_prompt=shown_prompt,
            outputs=frozenset(outputs),
            show_logprobs=params.get("logprobs") is not None,
            timeout_us=1500,
        )
        self.reply = Reply(self.call, self.client, tokenizer, self._cancel, trace)

    def _cancel(self, reason, index):
        self.reasons.append(reason)
        self.cancelled = index

    @property
    def cancels(self):
        return len(self.reasons)


def deltas(ids, request_id=0, reason=FinishReason.LENGTH, **last):
    """One delta per token, the last with a finish reason and what else is given."""
    *before, end = ids
    return [*(Delta(request_id, (token,)) for token in before), Delta(request_id, (end,), finish_reason=reason, **last)]


def test_a_stream_is_deltas_and_one_final_response(tokenizer):
    ids = tokenizer.encode(TEXT)[1:]
    talk = Conversation(tokenizer, outputs=["text_output", "finish_reason", "num_output_tokens", "total_output_tokens"])
    for delta in deltas(ids):
        talk.reply.feed([delta])
    client = talk.client
    assert "".join(client.sent("text_output")) == TEXT
    assert all(client.sent("text_output"))  # no response without text
    assert client.sent("finish_reason") == ["None"] * (len(client.responses) - 1) + ["length"]
    assert sum(n for (n,) in client.sent("num_output_tokens")) == len(ids)
    assert ["total_output_tokens" in response for response in client.responses].index(True) == len(client.responses) - 1
    assert client.responses[-1]["total_output_tokens"] == [len(ids)]
    assert (client.finals, talk.cancels, talk.reply.finished) == (1, 0, True)


def test_without_streaming_there_is_one_response_with_the_prompt_first(tokenizer):
    ids = tokenizer.encode(TEXT)[1:]
    talk = Conversation(tokenizer, stream=False, shown_prompt="Say: ", outputs=["text_output", "num_output_tokens"])
    for delta in deltas(ids):
        assert talk.reply.awaits(delta) == (delta.finish_reason is not None)
        talk.reply.feed([delta])
    assert talk.client.responses == [{"text_output": f"Say: {TEXT}", "num_output_tokens": [len(ids)]}]
    assert talk.client.finals == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_string_ends_the_reply_and_the_request(tokenizer, stream):
    ids = tokenizer.encode(TEXT)[1:]
    outputs = ["text_output", "finish_reason", "stop_reason", "num_output_tokens"]
    talk = Conversation(tokenizer, stream=stream, outputs=outputs, stop=("lazy d",))
    for delta in deltas(ids):
        assert talk.reply.awaits(delta)
        talk.reply.feed([delta])
    assert "".join(talk.client.sent("text_output")) == "The quick brown fox jumps over the "
    last = talk.client.responses[-1]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "lazy d")
    assert sum(n for (n,) in talk.client.sent("num_output_tokens")) < len(ids)
    assert (talk.client.finals, talk.cancels) == (1, 1)


def test_several_sequences_share_their_responses(tokenizer):
    outputs = ["text_output", "finish_reason", "num_output_tokens", "output_ids", "stop_reason", "total_output_tokens"]
    talk = Conversation(tokenizer, outputs=[*outputs, "cumulative_logprob"], n=2, stop=("lazy",), logprobs=0)
    texts, lazy = ["", ""], tokenizer.encode("the lazy dog", add_special_tokens=False)
    said = [lazy, tokenizer.encode("a brown fox jumps over the quick dog, and", add_special_tokens=False)]
    assert len(said[0]) < len(said[1])
    for k in range(len(said[1])):
        news = [
            Delta(0, (ids[k],), [TokenLogprobs([ids[k]], [-1.0], 1)], index=index)
            for index, ids in enumerate(said)
            if k < len(ids)
        ]
        news[-1].finish_reason = FinishReason.LENGTH if k == len(said[1]) - 1 else None
        talk.reply.feed(news)
    for response in talk.client.whole:
        assert {len(response[name]) for name in (*outputs[:3], "stop_reason", "cumulative_logprob")} == {2}
        assert sum(response["num_output_tokens"]) == len(response["output_ids"])
        texts = [before + new.decode() for before, new in zip(texts, response["text_output"], strict=True)]
    assert texts == ["the ", "a brown fox jumps over the quick dog, and"]
    last = talk.client.whole[-1]
    assert last["finish_reason"].tolist() == [b"stop", b"length"]
    assert last["stop_reason"].tolist() == [b"lazy", b"None"]
    assert ["total_output_tokens" in response for response in talk.client.whole].count(True) == 1
    stopped = -last["cumulative_logprob"][0]
    assert last["total_output_tokens"] == [stopped + len(said[1])]
    assert (talk.client.finals, talk.cancels, talk.cancelled) == (1, 1, 0)  # only the one that stopped


def test_without_streaming_several_sequences_come_together(tokenizer):
    talk = Conversation(tokenizer, stream=False, n=3, shown_prompt="Say: ", prompt_logprobs=0)
    talk.reply.feed([Delta(0, tuple(tokenizer.encode("dog", False)), finish_reason=FinishReason.LENGTH, index=2)])
    talk.reply.feed([Delta(0, tuple(tokenizer.encode("fox", False)), finish_reason=FinishReason.LENGTH, index=0)])
    assert talk.client.responses == []
    talk.reply.feed([Delta(0, tuple(tokenizer.encode("the", False)), finish_reason=FinishReason.LENGTH, index=1)])
    (response,) = talk.client.whole
    assert [text.decode() for text in response["text_output"]] == ["Say: fox", "Say: the", "Say: dog"]
    assert (talk.client.finals, talk.cancels) == (1, 0)


def test_the_prompts_logprobs_come_once(tokenizer):
    talk = Conversation(tokenizer, outputs=["prompt_logprobs", "output_ids"], prompt_logprobs=1)
    scores = [TokenLogprobs([2, 9], [-1.5, -0.5], 2), TokenLogprobs([3, 3], [-0.5, -0.5], 1)]
    talk.reply.feed([Delta(0, (5,), prompt_logprobs=scores)])
    talk.reply.feed([Delta(0, (6,), finish_reason=FinishReason.LENGTH)])
    first, last = talk.client.responses
    assert "prompt_logprobs" not in last
    nothing, second, third = json.loads(first["prompt_logprobs"])
    assert nothing is None
    assert (second["2"]["rank"], second["9"]["rank"], second["9"]["logprob"]) == (2, 1, -0.5)
    assert third["3"]["decoded_token"] == tokenizer.token_text(3)


def test_all_outputs_of_one_token(tokenizer):
    talk = Conversation(tokenizer, outputs=ALL_OUTPUTS, logprobs=2)
    (dog,) = tokenizer.encode(" dog", add_special_tokens=False)[-1:]
    entry = TokenLogprobs([dog, 7, dog], [-1.5, -0.5, -1.5], sampled_rank=2)
    talk.reply.feed([Delta(0, (dog,), logprobs=[entry], cached_tokens=2)])
    last_logprobs = [TokenLogprobs([9], [-2.0], 5)]
    talk.reply.feed([Delta(0, (9,), last_logprobs, FinishReason.STOP, stop_reason=9, account=ACCOUNT)])
    first, last = talk.client.responses
    assert json.loads(first.pop("logprobs")) == [
        {
            str(dog): {"logprob": -1.5, "rank": 2, "decoded_token": tokenizer.token_text(dog)},
            "7": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_text(7)},
        }
    ]
    assert first.pop("text_output").strip() == tokenizer.token_text(dog).strip()
    assert first == {
        "finish_reason": "None",
        "stop_reason": "None",
        "cumulative_logprob": [-1.5],
        "num_input_tokens": [3],
        "num_output_tokens": [1],
        "output_ids": [dog],
        "num_cached_tokens": [2],
    }
    assert (last["finish_reason"], last["stop_reason"], last["cumulative_logprob"]) == ("stop", "9", [-3.5])
    assert (last["num_cached_tokens"], last["total_output_tokens"]) == ([2], [2])
    assert {name: last[name][0] for name in ACCOUNT_OUTPUTS} == {
        "queue_time_s": 0.5,
        "prefill_time_s": 1.5,
        "decode_time_s": 2.0,
        "total_time_s": 4.0,
        "peak_kv_pages": 7,
        "energy_j": 12.5,
    }


def test_where_nothing_measures_energy_there_is_no_such_output(tokenizer):
    talk = Conversation(tokenizer, outputs=["energy_j", "total_time_s"], stream=False)
    talk.reply.feed(
        [Delta(0, (5,), finish_reason=FinishReason.LENGTH, account=structs.replace(ACCOUNT, energy_j=None))]
    )
    assert talk.client.responses == [{"total_time_s": [4.0]}]


@pytest.mark.parametrize("stream", [True, False])
def test_with_a_stop_string_the_account_is_waited_for(tokenizer, stream):
    ids = tokenizer.encode(TEXT)[1:]
    outputs = ["text_output", "finish_reason", "peak_kv_pages", "total_output_tokens"]
    talk = Conversation(tokenizer, stream=stream, outputs=outputs, stop=("lazy d",))
    for delta in deltas(ids, reason=None):
        talk.reply.feed([delta])
    assert not talk.reply.finished
    assert talk.reasons
    assert set(talk.reasons) == {FinishReason.STOP}
    talk.reply.feed([Delta(0, (), finish_reason=FinishReason.STOP, account=ACCOUNT)])
    assert "".join(talk.client.sent("text_output")) == "The quick brown fox jumps over the "
    last = talk.client.responses[-1]
    assert (last["finish_reason"], last["peak_kv_pages"]) == ("stop", [7])
    assert last["total_output_tokens"][0] < len(ids)
    assert talk.client.finals == 1


def test_several_sequences_have_one_account(tokenizer):
    talk = Conversation(tokenizer, outputs=["output_ids", *ACCOUNT_OUTPUTS], n=2, stop=("quick",))
    other = Account(100.0, 101.0, 101.5, 105.0, peak_pages=3, energy_j=2.5)
    for delta in deltas(tokenizer.encode(TEXT)[1:], reason=None):
        talk.reply.feed([delta])
    assert (talk.reasons, talk.cancelled) == ([FinishReason.STOP], 0)
    talk.reply.feed([Delta(0, (5,), index=1, finish_reason=FinishReason.LENGTH, account=other)])
    assert not talk.reply.finished
    talk.reply.feed([Delta(0, (), finish_reason=FinishReason.STOP, account=ACCOUNT)])
    assert {name: talk.client.responses[-1][name] for name in ACCOUNT_OUTPUTS} == {
        "queue_time_s": [0.5],
        "prefill_time_s": [1.0],
        "decode_time_s": [3.5],
        "total_time_s": [5.0],
        "peak_kv_pages": [10],
        "energy_j": [15.0],
    }


def test_while_the_account_is_waited_for_the_engine_may_die(tokenizer):
    talk = Conversation(tokenizer, outputs=["text_output", "total_time_s"], stop=("quick",))
    for delta in deltas(tokenizer.encode(TEXT)[1:], reason=None):
        talk.reply.feed([delta])
    talk.reply.feed([Failure("UNAVAILABLE", "the engine is gone")])
    assert (talk.client.finals, talk.client.failure.code) == (1, "UNAVAILABLE")


class Trace:
    """Keeps how it was told to end."""

    def __init__(self):
        self.ends = []

    def end(self, *how):
        self.ends.append(how)


def test_a_trace_is_ended_once_with_the_account(tokenizer):
    trace = Trace()
    talk = Conversation(tokenizer, trace=trace)
    for delta in deltas([5, 6, 7], account=ACCOUNT):
        talk.reply.feed([delta])
    talk.reply.feed([Delta(0, (8,))])
    assert trace.ends == [("length", 3, 3, ACCOUNT)]


def test_a_trace_of_a_failure_has_its_code(tokenizer):
    refused, late = Trace(), Trace()
    Conversation(tokenizer, trace=refused).reply.feed([Failure("INVALID_ARG", "prompt: too long")])
    news = [Delta(0, (5,)), Delta(0, (), finish_reason=FinishReason.DEADLINE, account=ACCOUNT)]
    Conversation(tokenizer, stream=False, trace=late).reply.feed(news)
    assert refused.ends == [("INVALID_ARG", 3, 0, None)]
    assert late.ends == [("UNAVAILABLE", 3, 0, ACCOUNT)]


def test_the_last_response_has_what_was_not_asked_for_as_parameters(tokenizer):
    talk = Conversation(tokenizer, outputs=["text_output", "finish_reason"], stream=True)
    talk.reply.feed([Delta(0, (5, 6), cached_tokens=2)])
    talk.reply.feed([Delta(0, (9,), finish_reason=FinishReason.STOP, stop_reason=9)])
    assert talk.client.parameters == {
        "stop_reason": "9",
        "num_input_tokens": 3,
        "total_output_tokens": 3,
        "num_cached_tokens": 2,
    }


def test_logprobs_that_were_not_asked_for_are_null(tokenizer):
    talk = Conversation(tokenizer, outputs=["text_output", "logprobs", "cumulative_logprob"])
    talk.reply.feed([Delta(0, (5,), [TokenLogprobs([5], [-1.0], 1)], FinishReason.LENGTH)])
    assert talk.client.responses[0]["logprobs"] == "null"
    assert talk.client.responses[0]["cumulative_logprob"] == [-1.0]


def test_ids_alone_need_no_tokenizer():
    talk = Conversation(None, outputs=["output_ids"])
    for delta in deltas([5, 6, 7]):
        talk.reply.feed([delta])
    assert talk.client.sent("output_ids") == [[5], [6], [7]]
    assert talk.client.finals == 1


def test_a_cancelled_request_says_so_one_way_or_the_other(tokenizer):
    talk = Conversation(tokenizer, outputs=["text_output", "finish_reason"])
    talk.reply.feed([Delta(0, (), finish_reason=FinishReason.CANCELLED)])
    assert (talk.client.responses[-1]["finish_reason"], talk.client.failure) == ("cancelled", None)
    talk = Conversation(tokenizer)
    talk.reply.feed([Delta(0, (), finish_reason=FinishReason.CANCELLED)])
    assert (talk.client.failure.code, talk.client.responses) == ("CANCELLED", [])


def test_a_missed_deadline_is_unavailable(tokenizer):
    talk = Conversation(tokenizer, outputs=["text_output", "finish_reason"])
    talk.reply.feed([Delta(0, (), finish_reason=FinishReason.DEADLINE)])
    assert talk.client.failure.code == "UNAVAILABLE"
    assert "timeout: not done 1500 us after" in talk.client.failure.message


@pytest.mark.parametrize("broken_after", [0, 3])
def test_a_response_that_cannot_be_sent_ends_the_request(tokenizer, broken_after):
    talk = Conversation(tokenizer, client=Client(broken_after=broken_after))
    for delta in deltas(tokenizer.encode(TEXT)[1:]):
        talk.reply.feed([delta])
    assert (talk.client.failure.code, len(talk.client.responses)) == ("INTERNAL", broken_after)
    assert "shared memory is full" in talk.client.failure.message
    assert (talk.client.finals, talk.cancels) == (1, 1)


class Crowd:
    """Conversations behind Senders."""

    def __init__(self, conversations, threads=3):
        self.talks = dict(enumerate(conversations))
        self.senders = Senders(threads)
        for request_id, talk in self.talks.items():
            self.senders.add(request_id, talk.reply)

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
        crowd.senders.add(7, crowd.talks[0].reply)
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
