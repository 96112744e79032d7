"""Streams of text, pushed in pieces of random width, and the full decode that they must add up to."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import Delta, FinishReason
from nanoflow_backend.text.text_stream import TextDelta, TextStream
from nanoflow_backend.text.tokenizer import Tokenizer


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
