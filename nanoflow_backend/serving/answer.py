"""Answer makes the tensors of a request's responses out of its text and token ids."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.scheduler.batch import FinishReason, TokenLogprobs
from nanoflow_backend.serving.call import Call
from nanoflow_backend.serving.tensors import Arrays, Parameters
from nanoflow_backend.text.logprobs_json import of_prompt, of_tokens
from nanoflow_backend.text.text_stream import TextDelta
from nanoflow_backend.text.tokenizer import Tokenizer


class _Sequence:
    """What adds up over the responses, of one sequence."""

    def __init__(self) -> None:
        self.tokens = 0
        self.logprob = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    def add(self, delta: TextDelta) -> None:
        self.tokens += len(delta.token_ids)
        self.logprob += math.fsum(entry.logprobs[0] for entry in delta.logprobs or ())
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class Answer:
    """Keeps what adds up over the responses of one call. Computes only the outputs that the call wants."""

    def __init__(self, call: Call, tokenizer: Tokenizer | None) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._unshown = call.shown_prompt
        self._sequences = [_Sequence() for _ in range(call.params.n)]
        self._cached_tokens = 0

    @property
    def output_tokens(self) -> int:
        """So far, of all sequences."""
        return sum(sequence.tokens for sequence in self._sequences)

    @property
    def outcome(self) -> str:
        """Why the sequences ended, in one word where they agree."""
        return ",".join(sorted({str(sequence.finish_reason) for sequence in self._sequences}))

    def tensors(self, deltas: Sequence[TextDelta], account: Account | None, last: bool) -> Arrays:
        """The outputs of one response: by name, with the dtypes and dims of the table.

        `deltas` is what is new of each sequence; `account` what the prompt took, with the last response.
        """
        for sequence, delta in zip(self._sequences, deltas, strict=True):
            sequence.add(delta)
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        values = ((name, self._value(name, deltas, account, last)) for name in self._call.outputs)
        tensors = {name: value for name, value in values if value is not None}
        self._unshown = ""
        return tensors

    def parameters(self) -> Parameters:
        """What there is to know at the end, after the last `tensors`; without what the outputs said.

        A parameter has one value: of several sequences there is only what they share.
        """
        known: dict[str, str | int] = {
            "num_input_tokens": len(self._call.prompt),
            "total_output_tokens": self.output_tokens,
            "num_cached_tokens": self._cached_tokens,
        }
        if len(self._sequences) == 1:
            known["finish_reason"] = str(self._sequences[0].finish_reason)
            known["stop_reason"] = str(self._sequences[0].stop_reason)
        return {name: value for name, value in known.items() if name not in self._call.outputs}

    def _value(
        self, name: str, deltas: Sequence[TextDelta], account: Account | None, last: bool
    ) -> NDArray[Any] | None:
        match name:
            case "text_output":
                return _strings(self._unshown + delta.text for delta in deltas)
            case "finish_reason":
                return _strings(str(sequence.finish_reason) for sequence in self._sequences)
            case "stop_reason":
                return _strings(str(sequence.stop_reason) for sequence in self._sequences)
            case "logprobs":
                shown = self._call.show_logprobs
                return _strings(self._logprobs_json(delta.logprobs or ()) if shown else "null" for delta in deltas)
            case "prompt_logprobs":
                return self._prompt_logprobs(deltas[0])
            case "cumulative_logprob":
                return np.array([sequence.logprob for sequence in self._sequences], np.float32)
            case "output_ids":
                return np.array([token for delta in deltas for token in delta.token_ids], np.int32)
            case "num_input_tokens":
                return np.array([len(self._call.prompt)], np.uint32)
            case "num_output_tokens":
                return np.array([len(delta.token_ids) for delta in deltas], np.uint32)
            case "batch_index":
                return None if self._call.batch_index is None else np.array([self._call.batch_index], np.uint32)
            case "num_cached_tokens":
                return np.array([self._cached_tokens], np.uint32)
            case "num_cancelled":
                return None  # only a cancellation has it
            case "total_output_tokens":
                return np.array([self.output_tokens], np.uint32) if last else None
            case "queue_time_s" | "prefill_time_s" | "decode_time_s" | "total_time_s" | "energy_j":
                value = None if account is None else getattr(account, name)
                return None if value is None else np.array([value], np.float32)
            case "peak_kv_pages":
                return None if account is None else np.array([account.peak_pages], np.uint32)
            case "num_host_cached_tokens":
                return None if account is None else np.array([account.host_tokens], np.uint32)
            case "num_disk_cached_tokens":
                return None if account is None else np.array([account.disk_tokens], np.uint32)
        raise AssertionError(f"output {name} is declared but not computed")

    def _prompt_logprobs(self, delta: TextDelta) -> NDArray[Any] | None:
        if delta.prompt_logprobs is None:
            return None
        return _strings([msgspec.json.encode(of_prompt(delta.prompt_logprobs, self._tokenizer)).decode()])

    def _logprobs_json(self, entries: Sequence[TokenLogprobs]) -> str:
        return msgspec.json.encode(of_tokens(entries, self._tokenizer)).decode()


def _strings(texts: Iterable[str]) -> NDArray[Any]:
    return np.array([text.encode() for text in texts], np.object_)
