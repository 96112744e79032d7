"""Where a stream of text ends: at stop strings, stop tokens, and what was held back for them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text.streamed_text import params, stream, text_of

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs
from nanoflow_backend.text.text_stream import TextDelta, TextStream, merge
from nanoflow_backend.text.tokenizer import Tokenizer


def oracle(tokenizer: Tokenizer, sampling: SamplingParams, ids: Sequence[int]) -> tuple[str, int, str | None]:
    """(text, tokens, stop string) by decoding every prefix in full and looking for each stop string at each end."""
    texts = [text_of(tokenizer, ids[:n], True).rstrip("\ufffd") for n in range(len(ids) + 1)]
    unchecked = len(texts[min(sampling.min_tokens, len(ids))])
    for end in range(unchecked + 1, len(texts[-1]) + 1):
        if found := [stop for stop in sampling.stop if texts[-1][:end].endswith(stop)]:
            stop = max(found, key=len)
            tokens = next(n for n, text in enumerate(texts) if len(text) >= end)
            return texts[-1][: end if sampling.include_stop_str_in_output else end - len(stop)], tokens, stop
    return texts[-1], len(ids), None


@settings(derandomize=True, deadline=None, max_examples=600)
@given(
    words=st.lists(st.sampled_from(["st", "sto", "stop", "op", " ", "a", "aab", "é", "好", "s"]), max_size=14),
    stops=st.lists(
        st.sampled_from(["stop", "top s", "op", "aa", "a", "aabaab", "é", "é好", "ststo", "zz"]), max_size=3
    ),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_stop_strings(
    tokenizer: Tokenizer, words: list[str], stops: list[str], min_tokens: int, include: bool, seed: int
) -> None:
    # token by token where words are, so that stop strings span tokens
    ids = [token_id for word in words for token_id in tokenizer.encode(word, add_special_tokens=False)]
    sampling = params(stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include)
    text, tokens, stop = oracle(tokenizer, sampling, ids)
    deltas = stream(tokenizer, sampling, [], ids, seed)
    shown = ""
    for delta in deltas:
        shown += delta.text
        assert text.startswith(shown)  # nothing of a stop string, ever
    whole = merge(*deltas)
    assert (shown, list(whole.token_ids)) == (text, ids[:tokens])
    assert (whole.finish_reason, whole.stop_reason) == (FinishReason.STOP if stop else FinishReason.LENGTH, stop)
    assert sum(delta.finish_reason is not None for delta in deltas) == 1


def test_text_waits_only_while_a_stop_string_is_possible(plain: Tokenizer) -> None:
    text_stream = TextStream(plain, params(stop=("<||>",)), [])
    shown = [text_stream.push(Delta(0, tuple(plain.encode(character, False)))).text for character in "x<||y<"]
    assert shown == ["x", "", "", "", "<||y", ""]


def test_overshoot_is_not_shown(plain: Tokenizer) -> None:
    ids = plain.encode("one stop two", add_special_tokens=False)
    logprobs = [TokenLogprobs([token_id], [-1.0], 1) for token_id in ids]
    text_stream = TextStream(plain, params(stop=("stop",), logprobs=0), [])
    delta = text_stream.push(Delta(0, tuple(ids), logprobs, FinishReason.LENGTH, cached_tokens=3))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("one ", FinishReason.STOP, "stop")
    assert plain.decode(delta.token_ids) == "one stop"
    assert delta.logprobs == logprobs[: len(delta.token_ids)]
    assert delta.cached_tokens == 3
    assert text_stream.finished
    assert text_stream.push(Delta(0, tuple(ids), finish_reason=FinishReason.CANCELLED)) == TextDelta()


@pytest.mark.parametrize(
    ("fields", "stop_reason", "text"),
    [
        ({}, None, "hi st"),
        ({"skip_special_tokens": False}, None, "hi st"),
        ({"include_stop_str_in_output": True}, None, "hi st"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, None, "hi st<|eot_id|>"),
        ({"stop_token_ids": (7,)}, 7, "hi st"),
        ({"stop": ("stop",)}, None, "hi st"),
    ],
)
def test_the_stopping_token_counts_but_has_no_text(
    plain: Tokenizer, fields: dict[str, object], stop_reason: int | None, text: str
) -> None:
    assert plain.eos_id is not None
    ids = plain.encode("hi st", add_special_tokens=False)
    text_stream = TextStream(plain, params(**fields), [])
    first = text_stream.push(Delta(0, tuple(ids)))
    last = text_stream.push(Delta(0, (plain.eos_id,), finish_reason=FinishReason.STOP, stop_reason=stop_reason))
    assert first.text + last.text == text
    assert last.token_ids == (plain.eos_id,)
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, stop_reason)


def test_a_stop_id_that_is_an_ordinary_token(plain: Tokenizer) -> None:
    ids = plain.encode("one two", add_special_tokens=False)
    delta = TextStream(plain, params(), []).push(
        Delta(0, tuple(ids), finish_reason=FinishReason.STOP, stop_reason=ids[-1])
    )
    assert delta.text == plain.decode(ids[:-1])
    included = TextStream(plain, params(include_stop_str_in_output=True), [])
    assert included.push(Delta(0, tuple(ids), finish_reason=FinishReason.STOP, stop_reason=ids[-1])).text == "one two"


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.LENGTH])
def test_what_is_held_back_is_released_at_the_end(plain: Tokenizer, reason: FinishReason) -> None:
    text_stream = TextStream(plain, params(stop=("stop",)), [])
    assert text_stream.push(Delta(0, tuple(plain.encode("a sto", False)))).text == "a "
    end = text_stream.push(Delta(0, (), finish_reason=reason))
    assert (end.text, end.finish_reason, end.stop_reason) == ("sto", reason, None)


def test_merged_deltas_say_the_same(plain: Tokenizer) -> None:
    rng = random.Random(2)
    ids = plain.encode("naïve café 👩‍👩‍👧 stop", add_special_tokens=False)
    text_stream = TextStream(plain, params(stop=("stop",), logprobs=0), [])
    pushes = [Delta(0, (i,), [TokenLogprobs([i], [-1.0], 1)], cached_tokens=4 * (n == 0)) for n, i in enumerate(ids)]
    deltas = [text_stream.push(delta) for delta in [*pushes, Delta(0, (), finish_reason=FinishReason.CANCELLED)]]
    whole = merge(*deltas)
    assert (whole.text, whole.finish_reason, whole.stop_reason) == ("naïve café 👩‍👩‍👧 ", FinishReason.STOP, "stop")
    assert (list(whole.token_ids), len(whole.logprobs or []), whole.cached_tokens) == (ids, len(ids), 4)
    for _ in range(20):
        queued = list(deltas)
        while len(queued) > 1:
            at = rng.randrange(len(queued) - 1)
            queued[at : at + 2] = [merge(queued[at], queued[at + 1])]
        assert queued == [whole]
