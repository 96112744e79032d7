"""TextStream against full decodes, at every split into pushes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text.streamed_text import params, stream, text_of
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from benchmarks.models.tiny_tokenizers import llama2
from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.text.text_stream import TextDelta, TextStream
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


def test_without_a_tokenizer_there_are_ids_only() -> None:
    text_stream = TextStream(None, params(), [1, 2])
    assert text_stream.push(Delta(0, (3, 4))) == TextDelta(token_ids=(3, 4))
    last = text_stream.push(Delta(0, (5,), finish_reason=FinishReason.STOP, stop_reason=5))
    assert last == TextDelta(token_ids=(5,), finish_reason=FinishReason.STOP, stop_reason=5)
    with pytest.raises(InvalidRequest, match="stop: expected none"):
        TextStream(None, params(stop=("x",)), [])
