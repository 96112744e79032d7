"""What the last responses of a reply say: the account of a request, its trace, and its logprobs."""

import json

import pytest
from msgspec import structs
from support.serving.conversation import ACCOUNT, TEXT, Conversation, deltas

from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs
from nanoflow_backend.serving.call import ALL_OUTPUTS
from nanoflow_backend.serving.failure import Failure
from nanoflow_backend.serving.tensors import ACCOUNT_OUTPUTS


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
        "num_host_cached_tokens": 16,
        "num_disk_cached_tokens": 32,
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
        "num_host_cached_tokens": [16],  # the second sequence shares what the first has loaded
        "num_disk_cached_tokens": [32],
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
