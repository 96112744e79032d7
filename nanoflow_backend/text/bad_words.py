"""encode_bad_words turns the words that a client forbids into token sequences."""

from __future__ import annotations

import msgspec

from nanoflow_backend.request.sampling_params import MOST_BAD_WORD_TOKENS, InvalidRequest, SamplingParams
from nanoflow_backend.text.tokenizer import Tokenizer


def encode_bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """The same with `bad_words` among `bad_words_token_ids`: each at the start of a text and, where that is another
    token sequence of the same length, after a space; as in vLLM.

    Raises:
        InvalidRequest: a word without tokens or with too many, or no tokenizer.
    """
    if not params.bad_words:
        return params
    if tokenizer is None:
        raise InvalidRequest("bad_words: expected none, for the model has no tokenizer.json (use bad_words_token_ids)")
    sequences = list(params.bad_words_token_ids)
    for word in params.bad_words:
        try:
            bare, spaced = (tokenizer.encode(space + word.lstrip(), add_special_tokens=False) for space in ("", " "))
        except InvalidRequest:
            raise InvalidRequest(f"bad_words: expected valid Unicode text, got {word!r}") from None
        if not bare:
            raise InvalidRequest(f"bad_words: expected words with at least one token, got {word!r}")
        if len(bare) > MOST_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words: expected words of at most {MOST_BAD_WORD_TOKENS} tokens, got {len(bare)} in {word!r}"
            )
        sequences.append(tuple(bare))
        if len(spaced) == len(bare) and spaced[0] != bare[0]:
            sequences.append(tuple(spaced))
    return msgspec.structs.replace(params, bad_words=(), bad_words_token_ids=tuple(sequences))
