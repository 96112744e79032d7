"""Limits bounds how much one request may carry and be answered, before any of it is decoded, parsed or tokenised.

A text that cannot fit the model, whatever its tokens are, is refused by its size. What may take longer than some 10 ms
to read is not read on the server's thread, by which all other requests come in.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from nanoflow_backend.config.engine_config import EngineConfig
from nanoflow_backend.process.messages import Ready
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.serving.tensors import Arrays
from nanoflow_backend.text.tokenizer import Tokenizer

MOST_TEXT_BYTES = 4 * 2**20  # texts and JSON of a request together; 131,072 tokens of prose are some 600 kB
MOST_TEXTS = 4096  # prompts, or stop strings
MOST_IDS = 2**20  # of all prompts together
MOST_PARAMETERS_BYTES = 2**20  # the request's own parameters, as JSON, and the input `sampling_parameters`
LOGPROB_BYTES = 96  # of JSON for a token and its log-probability, beside the token's text
ID_BYTES = 4
RESPONSE_BYTES, OUTPUT_BYTES = 640, 448  # what the server keeps of a response, and of each output beside its content
ESCAPED = 6  # bytes of JSON for a character: "\u0041"
QUICK_BYTES = 2**14  # texts of a request: tokenising runs at 1 to 3 MB/s, parsing of JSON at 2 MB/s at the worst


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to: sizes that are looked at before anything of it is read, and what the model has.

    `token_text_bytes`: the longest text of a token, as JSON spells it; 0 without a tokenizer.
    """

    prompt_bytes: int  # of one prompt's text
    max_model_tokens: int  # prompt and output
    cache_tokens: int
    vocab_size: int
    token_text_bytes: int
    max_answer_bytes: int
    max_queue_size: int  # sequences of one request, `n` of each prompt; more could never wait
    max_queue_us: int  # no request may wait longer, whatever it says; 0 is no limit

    @classmethod
    def of(cls, config: EngineConfig, ready: Ready, tokenizer: Tokenizer | None) -> Limits:
        """No text of more bytes than the model's tokens, all of them as long as the longest, can be a prompt."""
        longest_token_bytes = tokenizer.longest_token_bytes if tokenizer else 1
        return cls(
            prompt_bytes=min(ready.max_model_tokens * longest_token_bytes, MOST_TEXT_BYTES),
            max_model_tokens=ready.max_model_tokens,
            cache_tokens=ready.num_pages * ready.page_tokens,
            vocab_size=ready.vocab_size,
            token_text_bytes=tokenizer.longest_token_json_bytes if tokenizer else 0,
            max_answer_bytes=config.max_answer_bytes,
            max_queue_size=config.max_queue_size,
            max_queue_us=config.queue_timeout_us or 0,
        )

    def with_cache(self, ready: Ready) -> Limits:
        """The same for another engine process, whose KV cache may have another size."""
        return msgspec.structs.replace(self, cache_tokens=ready.num_pages * ready.page_tokens)

    def check(self, tensors: Arrays, parameters: str) -> None:
        """Look at the sizes of a request's inputs and of its own parameters, as JSON.

        Raises: InvalidRequest, naming the tensor, what it may have and what it has.
        """
        most_bytes = {
            "text_input": self.prompt_bytes,
            "prompts": self.prompt_bytes,
            "messages": min(ESCAPED * self.prompt_bytes, MOST_TEXT_BYTES),
            "sampling_parameters": MOST_PARAMETERS_BYTES,
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
        if len(parameters) > MOST_PARAMETERS_BYTES:
            raise InvalidRequest(
                f"parameters: expected at most {MOST_PARAMETERS_BYTES} bytes of JSON, got {len(parameters)}"
            )

    def check_chat(self, text: str) -> None:
        """Raises: InvalidRequest, the prompt that a chat template has made is too large to be tokenised."""
        if (size := len(text.encode(errors="surrogatepass"))) > self.prompt_bytes:
            raise InvalidRequest(
                f"messages: expected the prompt that the chat template makes of them to have at most "
                f"{self.prompt_bytes} bytes, got {size}"
            )

    def check_answer(self, params: SamplingParams, prompts: Sequence[int], shown_bytes: int, streamed: int) -> None:
        """Look at what an answer would take if every token of it were the longest.

        Args:
            prompts: the tokens of each prompt.
            shown_bytes: of the texts of all prompts, where they come before the answer's.
            streamed: outputs of each response, where it is a stream: the server keeps them until they are read; else 0.

        Raises: InvalidRequest, with both sizes and the fields to lower.
        """
        scored_bytes = LOGPROB_BYTES + self.token_text_bytes  # a token in `logprobs` or `prompt_logprobs`
        token_bytes = self.token_text_bytes + ID_BYTES
        if streamed:
            token_bytes += RESPONSE_BYTES + OUTPUT_BYTES * streamed
        if params.logprobs is not None:
            token_bytes += (1 + params.logprobs) * scored_bytes
        prompt_token_bytes = 0 if params.prompt_logprobs is None else (1 + params.prompt_logprobs) * scored_bytes
        tokens = sum(min(params.max_tokens, self.max_model_tokens - prompt) for prompt in prompts)
        answer_bytes = params.n * (tokens * token_bytes + shown_bytes) + sum(prompts) * prompt_token_bytes
        if answer_bytes > self.max_answer_bytes:
            asked = {"max_tokens": params.max_tokens, "n": params.n, "prompts": len(prompts)}
            scores = {name: getattr(params, name) for name in ("logprobs", "prompt_logprobs")}
            given = {name: value for name, value in asked.items() if value > 1}
            given |= {name: value for name, value in scores.items() if value is not None}
            fields = ", ".join(f"{name} ({value})" for name, value in given.items())
            raise InvalidRequest(
                f"answer: expected at most {self.max_answer_bytes} bytes (max_answer_bytes), could be {answer_bytes}: "
                f"lower {fields}"
            )


def reads_quickly(tensors: Arrays, parameters: str) -> bool:
    """Whether the server's thread may read such a request itself: it has no chat, and little text in all."""
    if "messages" in tensors:
        return False
    texts = (array for array in tensors.values() if array.dtype == object)
    return len(parameters) + sum(len(text) for array in texts for text in array.flat) <= QUICK_BYTES


def has_short_json(tensors: Arrays, parameters: str) -> bool:
    """Whether the server's thread may parse what such a request says of itself, its prompts and chat aside."""
    said = tensors.get("sampling_parameters", ())
    return len(parameters) + sum(len(text) for text in np.ravel(said)) <= QUICK_BYTES
