"""What a request may carry and be answered: bounded before any work for it, and no tighter than what it could take."""

import re

import msgspec
import numpy as np
import pytest
from support.serving.conversation import Client
from support.serving.parsed_call import LIMITS, parse

from benchmarks.models import tiny_tokenizers
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs
from nanoflow_backend.serving.reply import Reply
from nanoflow_backend.text.tokenizer import Tokenizer


class CountingTokenizer:
    """A tokenizer that notes what it is asked to encode."""

    def __init__(self, tokenizer):
        self._tokenizer, self.encoded = tokenizer, []

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, text, **options):
        self.encoded.append(text)
        return self._tokenizer.encode(text, **options)


def test_no_prompt_is_tokenised_after_one_that_cannot_run(tokenizer):
    counting = CountingTokenizer(tokenizer)
    prompts = ["the dog", "a " * 4096, *["b " * 4096] * 48]
    message = r"^prompt: expected at most 4095 tokens .* got \d+ in prompt 1$"
    with pytest.raises(InvalidRequest, match=message):
        parse(counting, prompts=prompts)
    assert counting.encoded == prompts[:2]


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (["x" * 2**20], "1 of at most 1048576, 1048576 together"),
        (["x" * 1025], "1 of at most 1025, 1025 together"),
        (["x" * 100] * 328, "328 of at most 100, 32800 together"),
        (["x"] * 1001, "1001 of at most 1, 1001 together"),
    ],
    ids=["a megabyte", "too long", "too much together", "too many"],
)
def test_bad_words_are_measured_before_they_are_tokenised(tokenizer, words, got):
    counting = CountingTokenizer(tokenizer)
    expected = "bad_words: expected at most 1000 words of at most 1024 characters, 32768 together, got "
    with pytest.raises(InvalidRequest) as refused:
        parse(counting, text_input="a", bad_words=words)
    assert str(refused.value) == expected + got
    assert counting.encoded == []


def test_bad_words_count_as_they_were_written(tokenizer):
    """Most become two token sequences, one of them with a space before it."""
    call = parse(tokenizer, text_input="a", bad_words=[f"a{number}" for number in range(1000)])
    assert len(call.params.bad_words_token_ids) == 2000
    with pytest.raises(InvalidRequest, match=r"^bad_words_token_ids: expected at most 1998 lists beside 1 bad_words"):
        parse(tokenizer, text_input="a", sampling_parameters={"bad_words": "a", "bad_words_token_ids": [[5]] * 1999})


def test_a_bad_word_of_too_many_tokens_is_named(tokenizer):
    with pytest.raises(InvalidRequest, match=r"^bad_words: expected words of at most 128 tokens, got 129 in 'q 7q 7"):
        parse(tokenizer, text_input="a", bad_words=["dog", "q 7" * 43])
    with pytest.raises(InvalidRequest, match=r"of at most 128 ids, got 1 of at most 129$"):
        parse(tokenizer, text_input="a", sampling_parameters={"bad_words_token_ids": [[5] * 129]})


def test_a_chat_that_its_template_makes_too_long_is_not_tokenised(tmp_path):
    folder = tiny_tokenizers.llama3(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content * 10000 }}")
    counting = CountingTokenizer(Tokenizer.from_pretrained(folder))
    message = "^messages: expected the prompt .* to have at most 65536 bytes, got 70000$"
    with pytest.raises(InvalidRequest, match=message):
        parse(counting, messages='[{"role": "user", "content": "the dog"}]')
    assert counting.encoded == []


def estimate(tokenizer, **request):
    """What the refusal says that an answer could be."""
    with pytest.raises(InvalidRequest, match=r"^answer: ") as refused:
        parse(tokenizer, limits=limits(tokenizer, 1), **request)
    return int(re.search(r"could be (\d+): lower", str(refused.value))[1])


def limits(tokenizer, max_answer_bytes):
    longest = tokenizer.longest_token_json_bytes
    return msgspec.structs.replace(LIMITS, max_answer_bytes=max_answer_bytes, token_text_bytes=longest)


def answered(call, tokenizer, token):
    """The bytes of all outputs, where every token is the same one and numbers have as many digits as they may."""

    def scores(count, alternatives):
        entry = TokenLogprobs(
            [token, *range(100_000, 100_000 + alternatives)], [-12.345678901234567] * (1 + alternatives), 9
        )
        return [entry] * count

    client = Client()
    reply = Reply(call, client, tokenizer, lambda *_: None)
    params = call.params
    for index in range(params.n):
        asked = params.prompt_logprobs if index == 0 else None
        reply.feed(
            [
                Delta(
                    0,
                    (token,) * params.max_tokens,
                    None if params.logprobs is None else scores(params.max_tokens, params.logprobs),
                    FinishReason.LENGTH,
                    index=index,
                    prompt_logprobs=None if asked is None else scores(len(call.prompt) - 1, asked),
                )
            ]
        )
    (tensors,) = client.whole
    texts = (array for array in tensors.values() if array.dtype == np.object_)
    return sum(len(text) for array in texts for text in array) + tensors["output_ids"].nbytes


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 300},
        {"max_tokens": 100, "n": 5},
        {"max_tokens": 200, "logprobs": 20},
        {"max_tokens": 50, "logprobs": 0, "n": 3},
        {"max_tokens": 10, "prompt_logprobs": 7},
    ],
    ids=lambda asked: " ".join(asked),
)
def test_an_answer_is_bounded_by_what_it_could_take(tokenizer, asked):
    request = {
        "text_input": "the quick brown fox " * 20,
        "sampling_parameters": {**asked, "skip_special_tokens": False},
        **{f"return_{name}": True for name in ("logprobs", "prompt_logprobs", "output_ids")},
    }
    could_be = estimate(tokenizer, **request)
    call = parse(tokenizer, limits=limits(tokenizer, could_be), **request)
    text = max(range(tokenizer.vocab_size), key=lambda token: len(tokenizer.token_text(token)))
    is_ = answered(call, tokenizer, text)
    assert is_ <= could_be
    assert could_be < 3 * is_ + 1000, "no answer comes near the bound"


def test_the_refusal_of_an_answer_names_what_to_lower(tokenizer):
    asked = {"max_tokens": 1000, "n": 8, "logprobs": 5}
    several = {"prompts": ["the dog", "a"], "sampling_parameters": asked}
    message = (
        r"^answer: expected at most 1 bytes \(max_answer_bytes\), could be \d+: "
        r"lower max_tokens \(1000\), n \(8\), prompts \(2\), logprobs \(5\)$"
    )
    with pytest.raises(InvalidRequest, match=message):
        parse(tokenizer, limits=limits(tokenizer, 1), **several)
    one = estimate(tokenizer, text_input="a", sampling_parameters=asked)
    assert estimate(tokenizer, **several) == pytest.approx(2 * one, rel=1e-3)


def test_an_answer_without_limit_ends_with_the_model(tokenizer):
    """None is no limit of its own; a stream also costs what the server keeps of each response."""
    endless = {"text_input": "a", "sampling_parameters": {"max_tokens": None}}
    whole, stream = estimate(tokenizer, **endless), estimate(tokenizer, **endless, stream=True)
    with_reason = estimate(tokenizer, **endless, stream=True, return_finish_reason=True)
    tokens = LIMITS.max_model_tokens - len(tokenizer.encode("a"))
    assert whole == tokens * (tokenizer.longest_token_json_bytes + 4) + 1
    assert stream == whole - 1 + tokens * (640 + 448)
    assert with_reason == stream + tokens * 448
