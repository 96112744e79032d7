"""Completion is the whole answer to one prompt; Progress is what one step adds to it; a Job asks for it."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.batch import FinishReason, TokenLogprobs
from nanoflow_backend.text.text_stream import TextDelta, merge

Job = tuple[str | list[int], SamplingParams]  # a prompt, as text or as token ids, and how to continue it


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole continuation of one prompt. `text` is empty for a model without a tokenizer."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    num_input_tokens: int
    num_cached_tokens: int
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None  # of all prompt tokens but the first; with index 0 only
    index: int = 0  # among the `n` of the prompt

    @classmethod
    def of(cls, deltas: list[TextDelta], num_input_tokens: int, index: int) -> Completion:
        """Put together all deltas of one sequence, in order."""
        whole = merge(*deltas)
        assert whole.finish_reason is not None, "a request that ended says why"
        return cls(
            text=whole.text,
            token_ids=list(whole.token_ids),
            finish_reason=whole.finish_reason,
            stop_reason=whole.stop_reason,
            num_input_tokens=num_input_tokens,
            num_cached_tokens=whole.cached_tokens,
            logprobs=whole.logprobs,
            prompt_logprobs=whole.prompt_logprobs,
            index=index,
        )


class Progress(NamedTuple):
    """What a step brought to one sequence of a prompt."""

    delta: TextDelta
    num_input_tokens: int
    sequence: int  # among the `n` of the prompt
