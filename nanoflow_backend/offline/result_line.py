"""ResultLine is one line of a batch's output, as it is written and counted."""

from __future__ import annotations

from typing import Any

import msgspec

from nanoflow_backend.engine.completion import Completion
from nanoflow_backend.request.internal_error import RequestError
from nanoflow_backend.text.logprobs_json import of_prompt, of_tokens
from nanoflow_backend.text.tokenizer import Tokenizer


class ResultLine(msgspec.Struct, frozen=True):
    """The line's JSON, whether it is an error, and the number of output tokens in it."""

    json: bytes  # without a newline
    failed: bool
    tokens: int

    @classmethod
    def of(cls, id: Any, result: Completion | RequestError, tokenizer: Tokenizer | None) -> ResultLine:
        """See `result_fields`."""
        tokens = 0 if isinstance(result, RequestError) else len(result.token_ids)
        fields = result_fields(id, result, tokenizer)
        return cls(msgspec.json.encode(fields), isinstance(result, RequestError), tokens)


def result_fields(id: Any, result: Completion | RequestError, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One line of the output: the id first; then an `error`, or the completion.

    `logprobs` and `prompt_logprobs` are there where they were asked for, in the form of the server's outputs.
    """
    if isinstance(result, RequestError):
        return {"id": id, "error": str(result)}
    fields = {
        "id": id,
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "num_input_tokens": result.num_input_tokens,
        "num_output_tokens": len(result.token_ids),
    }
    if result.logprobs is not None:
        fields["logprobs"] = of_tokens(result.logprobs, tokenizer)
    if result.prompt_logprobs is not None:
        fields["prompt_logprobs"] = of_prompt(result.prompt_logprobs, tokenizer)
    return fields
