"""Limits bounds how much one request may carry, before any of it is decoded, parsed or tokenised.

Tokenising runs at a megabyte or so a second, and no other request is accepted meanwhile: a text that cannot fit the
model, whatever its tokens are, is refused by its size.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from nanoflow_backend.request.sampling_params import InvalidRequest
from nanoflow_backend.serving.tensors import Arrays
from nanoflow_backend.text.tokenizer import Tokenizer

MOST_TEXT_BYTES = 4 * 2**20  # texts and JSON of a request together; 131,072 tokens of prose are some 600 kB
MOST_TEXTS = 4096  # prompts, or stop strings
MOST_IDS = 2**20  # of all prompts together
MOST_PARAMETERS_BYTES = 2**20  # the request's own parameters, as JSON
ESCAPED = 6  # bytes of JSON for a character: "\u0041"


class Limits(msgspec.Struct, frozen=True):
    """The sizes that a request must keep to before anything of it is read."""

    prompt_bytes: int  # of one prompt's text

    @classmethod
    def of(cls, max_model_tokens: int, tokenizer: Tokenizer | None) -> Limits:
        """No text of more bytes than the model's tokens, all of them as long as the longest, can be a prompt."""
        longest_token_bytes = tokenizer.longest_token_bytes if tokenizer else 1
        return cls(min(max_model_tokens * longest_token_bytes, MOST_TEXT_BYTES))

    def check(self, tensors: Arrays) -> None:
        """Raises: InvalidRequest, naming the tensor, what it may have and what it has."""
        most_bytes = {
            "text_input": self.prompt_bytes,
            "prompts": self.prompt_bytes,
            "messages": min(ESCAPED * self.prompt_bytes, MOST_TEXT_BYTES),
        }
        total_bytes = 0
        for name, array in tensors.items():
            is_text = array.dtype == object
            most = MOST_TEXTS if is_text else MOST_IDS
            if array.size > most:
                raise InvalidRequest(f"{name}: expected at most {most} elements, got {array.size}")
            if is_text and array.size:
                sizes = [len(text) for text in array.flat]
                total_bytes += sum(sizes)
                allowed = most_bytes.get(name, MOST_TEXT_BYTES)
                if max(sizes) > allowed:
                    raise InvalidRequest(f"{name}: expected at most {allowed} bytes, got {max(sizes)}")
        if total_bytes > MOST_TEXT_BYTES:
            raise InvalidRequest(f"texts: expected at most {MOST_TEXT_BYTES} bytes in a request, got {total_bytes}")


def read_parameters(request: Any) -> dict[str, Any]:
    """The own parameters of a request of the server. Raises: InvalidRequest, they are too large."""
    parameters: str = request.parameters() or "{}"
    if len(parameters) > MOST_PARAMETERS_BYTES:
        raise InvalidRequest(
            f"parameters: expected at most {MOST_PARAMETERS_BYTES} bytes of JSON, got {len(parameters)}"
        )
    timeout_us = request.timeout()
    return {**json.loads(parameters), **({"timeout": timeout_us} if timeout_us else {})}
