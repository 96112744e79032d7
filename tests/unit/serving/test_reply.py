"""Replies: deltas in, tensors out, exactly one final response whatever happens."""

import pytest
from support.serving.conversation import TEXT, Client, Conversation, deltas

from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs


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
