"""Log-probabilities as clients get them, in the server's outputs and in a batch's results: vLLM's form.

Each token has an object from token id to {"logprob", "rank", "decoded_token"}: itself first, then the most likely ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanoflow_backend.scheduler.batch import TokenLogprobs
from nanoflow_backend.text.tokenizer import Tokenizer

TokenObject = dict[int, dict[str, Any]]


def of_tokens(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> list[TokenObject]:
    """An object for each entry; `decoded_token` is null for a model without a tokenizer."""
    return [_of_token(entry, tokenizer) for entry in entries]


def of_prompt(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer | None) -> list[TokenObject | None]:
    """An object for each token of a prompt; null for the first, which follows nothing and has no entry."""
    return [None, *of_tokens(entries, tokenizer)]


def _of_token(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> TokenObject:
    """The sampled token, which the entry has first, then the most likely ones by rank; one of them may be it."""
    ranks = [entry.sampled_rank, *range(1, len(entry.token_ids))]
    return {
        token_id: {
            "logprob": logprob,
            "rank": rank,
            "decoded_token": None if tokenizer is None else tokenizer.token_text(token_id),
        }
        for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True)
    }
