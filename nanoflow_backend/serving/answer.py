"""Answer: the text and ids of one request -> the tensors of its responses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.engine.text_stream import TextDelta
from nanoflow_backend.engine.tokenizer import Tokenizer
from nanoflow_backend.scheduler.batch import TokenLogprobs
from nanoflow_backend.serving.call import Call
from nanoflow_backend.serving.tensors import Arrays


class Answer:
    """Keeps what adds up over the responses of one call. Computes only the outputs that the call wants.

    Attributes:
        output_tokens: so far.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._unshown = call.shown_prompt
        self.output_tokens = 0
        self._logprob = 0.0
        self._cached_tokens = 0

    def tensors(self, delta: TextDelta) -> Arrays:
        """The outputs of one response, which carries `delta`: by name, with the dtypes and dims of the table."""
        self.output_tokens += len(delta.token_ids)
        self._logprob += math.fsum(entry.logprobs[0] for entry in delta.logprobs or ())
        self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        values = ((name, self._value(name, delta)) for name in self._call.outputs)
        return {name: value for name, value in values if value is not None}

    def _value(self, name: str, delta: TextDelta) -> NDArray[Any] | None:
        match name:
            case "text_output":
                text, self._unshown = self._unshown + delta.text, ""
                return _strings(text)
            case "finish_reason":
                return _strings(str(delta.finish_reason))
            case "stop_reason":
                return _strings(str(delta.stop_reason))
            case "logprobs":
                return _strings(self._logprobs_json(delta.logprobs or ()) if self._call.show_logprobs else "null")
            case "cumulative_logprob":
                return np.array([self._logprob], np.float32)
            case "output_ids":
                return np.array(delta.token_ids, np.int32)
            case "num_input_tokens":
                return np.array([len(self._call.prompt)], np.uint32)
            case "num_output_tokens":
                return np.array([len(delta.token_ids)], np.uint32)
            case "num_cached_tokens":
                return np.array([self._cached_tokens], np.uint32)
            case "total_output_tokens":
                return None if delta.finish_reason is None else np.array([self.output_tokens], np.uint32)
            case "queue_time_s" | "prefill_time_s" | "decode_time_s" | "total_time_s" | "energy_j":
                value = None if delta.account is None else getattr(delta.account, name)
                return None if value is None else np.array([value], np.float32)
            case "peak_kv_pages":
                return None if delta.account is None else np.array([delta.account.peak_pages], np.uint32)
        raise AssertionError(f"output {name} is declared but not computed")

    def _logprobs_json(self, entries: Sequence[TokenLogprobs]) -> str:
        return msgspec.json.encode([self._of_token(entry) for entry in entries]).decode()

    def _of_token(self, entry: TokenLogprobs) -> dict[int, dict[str, Any]]:
        """The sampled token, which the entry has first, then the most likely ones by rank; one of them may be it."""
        ranks = [entry.sampled_rank, *range(1, len(entry.token_ids))]
        return {
            token_id: {"logprob": logprob, "rank": rank, "decoded_token": self._token_text(token_id)}
            for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True)
        }

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


def _strings(text: str) -> NDArray[Any]:
    return np.array([text.encode()], np.object_)
