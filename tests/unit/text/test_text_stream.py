"""TextStream against full decodes and full-text searches, at every split into pushes."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from benchmarks.models.tiny_tokenizers import SHAPES, llama2, llama3
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import Delta, FinishReason, TokenLogprobs
from nanoflow_backend.text.text_stream import TextDelta, TextStream, merge
from nanoflow_backend.text.tokenizer import Tokenizer

PIECES = [
    "stop",
    " st",
    "op",
    "a",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "👩‍👩‍👧",
    "你好",
    "\u200d",
    "\x00",
    "\ufffd",
    "<s>",
    "<|eot_id|>",
]
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
quickly = settings(derandomize=True, deadline=None, max_examples=150)


@pytest.fixture(scope="module", params=SHAPES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(SHAPES[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(llama3(tmp_path_factory.mktemp("plain")))


def params(**fields: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1000, **fields})  # type: ignore[arg-type]


def split(ids: Sequence[int], rng: random.Random, finish: FinishReason = FinishReason.LENGTH) -> Iterator[Delta]:
    """The ids as deltas of 0 to 4 tokens, the last of which ends the request."""
    start = 0
    while start < len(ids):
        width = rng.randrange(5)
        yield Delta(0, tuple(ids[start : start + width]))
        start += width
    yield Delta(0, (), finish_reason=finish)


def stream(
    tokenizer: Tokenizer, sampling: SamplingParams, prompt: Sequence[int], ids: Sequence[int], seed: int = 0
) -> list[TextDelta]:
    text_stream = TextStream(tokenizer, sampling, prompt)
    return [text_stream.push(delta) for delta in split(ids, random.Random(seed))]


def text_of(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool) -> str:
    """Full decode by the `tokenizers` library; where SentencePiece bytes are malformed, by the definition: a run of
    byte tokens is UTF-8, and each byte that is part of no character is U+FFFD."""
    whole = tokenizer.decode(ids, skip_special_tokens)
    token_of = tokenizer._backend.id_to_token
    if token_of(3) != "<0x00>" or "\ufffd" not in whole:
        return whole
    hidden = tokenizer.special_ids if skip_special_tokens else set()
    text, run = "", b""
    for token in [*(token_of(token_id) for token_id in ids if token_id not in hidden), ""]:
        if token is None:
            continue
        if byte := re.fullmatch("<0x(..)>", token):
            run += bytes.fromhex(byte[1])
            continue
        while run:
            width = next((n for n in (1, 2, 3, 4) if is_character(run[:n])), 0)
            text += run[:width].decode() if width else "\ufffd"
            run = run[width or 1 :]
        text += token.replace("▁", " ")
    return text.removeprefix(" ")


def is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


@quickly
@given(prompt=texts, output=texts, seed=st.integers(0, 1000), skip=st.booleans())
def test_streams_what_a_full_decode_gives(
    tokenizer: Tokenizer, prompt: str, output: str, seed: int, skip: bool
) -> None:
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(output, add_special_tokens=False)
    whole = tokenizer.decode([*prompt_ids, *ids], skip)
    deltas = stream(tokenizer, params(skip_special_tokens=skip), prompt_ids, ids, seed)
    assert tokenizer.decode(prompt_ids, skip) + "".join(delta.text for delta in deltas) == whole
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids(tokenizer: Tokenizer, skip: bool) -> None:
    """Any ids, also ones that no token has: broken characters where the full decode has them and nowhere else."""
    rng = random.Random(1)
    prompts = [[], tokenizer.encode(""), tokenizer.encode("The dog"), tokenizer.encode("a </s> ")]
    for n in range(400):
        prompt = prompts[n % len(prompts)]
        alphabet = rng.choice([tokenizer.vocab_size + 3, 260])  # 260: mostly single bytes
        ids = [rng.randrange(alphabet) for _ in range(rng.randrange(1, 30))]
        whole = text_of(tokenizer, [*prompt, *ids], skip)
        shown = text_of(tokenizer, prompt, skip)
        for delta in stream(tokenizer, params(skip_special_tokens=skip), prompt, ids, seed=n):
            shown += delta.text
            assert whole.startswith(shown)
        assert shown == whole


def test_a_character_is_shown_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x𓀀", add_special_tokens=False)
    text_stream = TextStream(tokenizer, params(), tokenizer.encode("The"))
    shown = [text_stream.push(Delta(0, (token_id,))).text for token_id in ids]
    assert shown[-4:] == ["", "", "", "𓀀"]
    cut = TextStream(tokenizer, params(), [])
    cut.push(Delta(0, tuple(ids[:-1])))
    end = cut.push(Delta(0, (), finish_reason=FinishReason.LENGTH)).text
    assert end == tokenizer.decode(ids[:-1])[1:] != ""


def test_a_prompt_may_end_within_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("x𓀀y", add_special_tokens=False)
    for cut, expected in ((-5, "𓀀y"), (-4, "𓀀y"), (-3, "𓀀y"), (-2, "𓀀y"), (-1, "y")):
        assert "".join(delta.text for delta in stream(tokenizer, params(), ids[:cut], ids[cut:])) == expected


def test_numbers_that_no_token_has_add_nothing_and_are_not_remembered(plain: Tokenizer) -> None:
    strays = [-1, 10**6, 2**40]
    assert "".join(delta.text for delta in stream(plain, params(), strays, [*strays, *plain.encode("a", False)])) == "a"
    assert not set(strays) & set(plain.token_bytes(skip_special_tokens=True))


def test_a_space_after_special_tokens_is_kept(tmp_path: Path) -> None:
    """Where a sliding window that holds only skipped tokens would take the next token for the first of the text."""
    tokenizer = Tokenizer.from_pretrained(llama2(tmp_path))
    space_dog = tokenizer.encode("dog", add_special_tokens=False)
    eos = tokenizer.eos_id
    assert eos is not None
    first = "".join(delta.text for delta in stream(tokenizer, params(), [1], [*space_dog, eos, eos, eos, *space_dog]))
    assert first == "dog dog"


@pytest.mark.parametrize(
    ("decoder", "tokens", "text"),
    [
        (None, ["a", "b", "c"], "a b c"),
        (decoders.Metaspace(), ["▁a", "▁b", "c▁▁d"], "a bc  d"),
        (decoders.Metaspace(prepend_scheme="never"), ["▁a", "▁b"], " a b"),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
            ["▁a", "<0x41>"],
            " aA",
        ),
        (decoders.Fuse(), ["▁a", "<0x41>"], "▁a<0x41>"),
    ],
)
def test_other_decoders(tmp_path: Path, decoder: decoders.Decoder | None, tokens: list[str], text: str) -> None:
    backend = Backend(models.WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.decoder = decoder
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    ids = list(range(len(tokens)))
    assert "".join(delta.text for delta in stream(tokenizer, params(), [], ids)) == tokenizer.decode(ids) == text


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


def test_without_a_tokenizer_there_are_ids_only() -> None:
    text_stream = TextStream(None, params(), [1, 2])
    assert text_stream.push(Delta(0, (3, 4))) == TextDelta(token_ids=(3, 4))
    last = text_stream.push(Delta(0, (5,), finish_reason=FinishReason.STOP, stop_reason=5))
    assert last == TextDelta(token_ids=(5,), finish_reason=FinishReason.STOP, stop_reason=5)
    with pytest.raises(InvalidRequest, match="stop: expected none"):
        TextStream(None, params(stop=("x",)), [])
