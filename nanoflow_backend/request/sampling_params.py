"""SamplingParams holds what a client may ask of sampling, under the names that vLLM made common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from nanoflow_backend.request.invalid_request import InvalidRequest as InvalidRequest
from nanoflow_backend.request.structured_outputs import StructuredOutputs, decoded

MOST_TOKENS = 2**31 - 1
MOST_STOPS = 256
MOST_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20  # as many alternatives per token as other servers return by default
MOST_SEQUENCES = 128  # of one request
MOST_BIASES = 300  # as OpenAI's API allows
MOST_BAD_WORDS = 1000
MOST_BAD_WORD_CHARACTERS = 1024  # of one
MOST_BAD_WORDS_CHARACTERS = 32768  # of all together
SPELLINGS = 2  # token sequences that a bad word may become: at the start of a text, and after a space
MOST_BAD_WORD_TOKENS = 128  # of one; what a step costs grows with how many lengths there are
MOST_ALLOWED = 4096  # token ids


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one request is sampled and when it stops.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off; `logprobs` n returns the n most likely tokens beside
    the sampled one, `prompt_logprobs` the same of the prompt's. A seed makes a request reproducible whatever batch it
    runs in; of `n` sequences, sequence i has seed + i.

    repetition_penalty divides positive logits of tokens of prompt and output (and multiplies negative ones);
    frequency_penalty is subtracted for each time that the output has a token, presence_penalty once. The output never
    completes a bad word; `bad_words_token_ids` says the same in tokens, and is what `bad_words` becomes.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()  # none: all
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    structured_outputs: StructuredOutputs | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, expected: str) -> None:
            if not ok:
                raise InvalidRequest(f"{field}: expected {expected}, got {getattr(self, field)!r}")

        require(1 <= self.max_tokens <= MOST_TOKENS, "max_tokens", "an integer in 1..2^31-1")
        require(
            0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"an integer in 0..{self.max_tokens} (max_tokens)"
        )
        require(0 <= self.temperature < float("inf"), "temperature", "a finite number >= 0")
        require(0 <= self.top_k < 2**31, "top_k", "an integer in 1..2^31-1, or 0 or -1 for all tokens")
        require(0 < self.top_p <= 1, "top_p", "a number in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", "a number in [0, 1]")
        require(1 <= self.n <= MOST_SEQUENCES, "n", f"an integer in 1..{MOST_SEQUENCES}")
        require(self.n == 1 or self.temperature > 0, "n", "1 where temperature is 0: all would be the same")
        require(0 < self.repetition_penalty < math.inf, "repetition_penalty", "a finite number > 0")
        require(-2 <= self.presence_penalty <= 2, "presence_penalty", "a number in [-2, 2]")
        require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "a number in [-2, 2]")
        self._check_lists(require)
        require(self.seed is None or 0 <= self.seed < 2**63, "seed", "an integer in 0..2^63-1, or -1 for any")
        require(all(self.stop), "stop", "non-empty strings")
        stops_ok = len(self.stop) <= MOST_STOPS and all(len(text) <= MOST_STOP_CHARACTERS for text in self.stop)
        require(stops_ok, "stop", f"at most {MOST_STOPS} strings of at most {MOST_STOP_CHARACTERS} characters")
        require(len(self.stop_token_ids) <= MOST_STOPS, "stop_token_ids", f"at most {MOST_STOPS}")
        require(all(0 <= i < 2**31 for i in self.stop_token_ids), "stop_token_ids", "token ids >= 0")
        for field in ("logprobs", "prompt_logprobs"):
            ok = getattr(self, field) is None or 0 <= getattr(self, field) <= MAX_LOGPROBS
            require(ok, field, f"an integer in 0..{MAX_LOGPROBS}")

    def _check_lists(self, require: Callable[[bool, str, str], None]) -> None:
        require(len(self.logit_bias) <= MOST_BIASES, "logit_bias", f"at most {MOST_BIASES} token ids")
        biases_ok = all(0 <= token < 2**31 and -100 <= bias <= 100 for token, bias in self.logit_bias.items())
        require(biases_ok, "logit_bias", "token ids >= 0 with numbers in [-100, 100]")
        require(len(self.allowed_token_ids) <= MOST_ALLOWED, "allowed_token_ids", f"at most {MOST_ALLOWED}")
        require(all(0 <= i < 2**31 for i in self.allowed_token_ids), "allowed_token_ids", "token ids >= 0")
        self._check_bad_words(require)

    def _check_bad_words(self, require: Callable[[bool, str, str], None]) -> None:
        words, sequences = self.bad_words, self.bad_words_token_ids
        sizes = [len(word) for word in words]
        longest, characters = max(sizes, default=0), sum(sizes)
        if len(words) > MOST_BAD_WORDS or longest > MOST_BAD_WORD_CHARACTERS or characters > MOST_BAD_WORDS_CHARACTERS:
            raise InvalidRequest(
                f"bad_words: expected at most {MOST_BAD_WORDS} words of at most {MOST_BAD_WORD_CHARACTERS} characters, "
                f"{MOST_BAD_WORDS_CHARACTERS} together, got {len(words)} of at most {longest}, {characters} together"
            )
        require(all(word.strip() for word in words), "bad_words", "texts that are not empty")
        allowed = SPELLINGS * (MOST_BAD_WORDS - len(words))
        longest = max((len(ids) for ids in sequences), default=0)
        if len(sequences) > allowed or longest > MOST_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"bad_words_token_ids: expected at most {allowed} lists beside {len(words)} bad_words, of at most "
                f"{MOST_BAD_WORD_TOKENS} ids, got {len(sequences)} of at most {longest}"
            )
        sequences_ok = all(ids and all(0 <= i < 2**31 for i in ids) for ids in sequences)
        require(sequences_ok, "bad_words_token_ids", "lists of token ids >= 0, none of them empty")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def is_constrained(self) -> bool:
        """Which tokens may come next is for the host to say, by those that came before."""
        return bool(self.structured_outputs or self.bad_words_token_ids or self.allowed_token_ids)

    @property
    def reads_tokens(self) -> bool:
        """Sampling depends on the tokens of prompt or output, not on the last row of logits alone."""
        return self.penalises or self.is_constrained or self.prompt_logprobs is not None

    def of_sequence(self, index: int) -> SamplingParams:
        """What sequence `index` of the `n` is sampled with: its own seed, and the prompt is scored but once."""
        if self.n == 1:
            return self
        seed = None if self.seed is None else (self.seed + index) % 2**63
        return msgspec.structs.replace(self, n=1, seed=seed, prompt_logprobs=None if index else self.prompt_logprobs)

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Build from a client's mapping: numbers may be strings ("128"), `stop` may be one string.

        Every vLLM SamplingParams name is recognised. A name that is not implemented yet is accepted at its
        neutral value (None is one for all) and refused otherwise.

        Raises:
            InvalidRequest: naming the field and what was expected.
        """
        fields = dict(fields)
        known: dict[str, Any] = {}
        older = StructuredOutputs.from_older_names(fields)
        if older is not None:
            if fields.get("structured_outputs") is not None:
                raise InvalidRequest("structured_outputs: expected it alone, got guided decoding under older names too")
            fields["structured_outputs"] = older
        for name, value in fields.items():
            if name in cls.__struct_fields__:
                if (
                    value is not None or name == "max_tokens"
                ):  # None is the default; for max_tokens no limit, as in vLLM
                    known[name] = _normalise(name, value)
            elif name not in NEUTRAL_VALUES:
                known_names = ", ".join(cls.__struct_fields__)
                raise InvalidRequest(f"{name}: unknown sampling parameter; known are {known_names}")
            elif value is not None and value not in NEUTRAL_VALUES[name]:
                raise InvalidRequest(
                    f"{name}: not implemented; expected its neutral value {NEUTRAL_VALUES[name][0]!r}, got {value!r}"
                )
        try:
            return msgspec.convert(known, cls, strict=False)
        except msgspec.ValidationError as error:  # "Expected `int`, got `str` - at `$.max_tokens`"
            if isinstance(error.__cause__, InvalidRequest):
                raise error.__cause__ from None
            reason, _, path = str(error).partition(" - at ")  # `$.stop[0]`, or `key` in `$.logit_bias`
            raise InvalidRequest(f"{path.rpartition('$.')[2].rstrip('`')}: {reason}") from None


# The other vLLM names with the values that mean "not used", as they come from JSON, gRPC strings or tensors.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1, "1"),
    "length_penalty": (1, "1", "1.0"),
    "early_stopping": (False, "false"),
    "use_beam_search": (False, "false"),
    "detokenize": (True, "true"),
    "spaces_between_special_tokens": (True, "true"),
    "flat_logprobs": (False, "false"),
    "skip_clone": (False, "false"),
    "skip_reading_prefix_cache": (None, False, "false"),
    "routed_experts_prompt_start": (0, "0"),
    "thinking_token_budget": (None, -1, "-1"),
    "repetition_detection": (None, {"max_pattern_size": 0, "min_pattern_size": 0, "min_count": 0}),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None, []),
    "lora_name": (None,),
    "output_text_buffer_length": (0, "0"),
    "stream_interval": (None, 1, "1"),
    "trace_decode_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "logits_processors": (None, []),
    "extra_args": (None, {}),
    "output_kind": (None, 0, 1, 2, "0", "1", "2"),  # how vLLM returns text; here the `stream` input decides
}


def _normalise(name: str, value: Any) -> Any:
    """The spellings clients use: one stop string, -1 for "all tokens" or "any seed", JSON in a text, None: no limit."""
    if value is None:
        return MOST_TOKENS
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "stop_token_ids" and isinstance(value, int):
        return (value,)
    if name == "bad_words" and isinstance(value, str) and not value.startswith("["):
        return (value,)
    if name in ("logit_bias", "allowed_token_ids", "bad_words", "bad_words_token_ids"):
        return decoded(value, name)
    if name == "structured_outputs":
        return value if isinstance(value, StructuredOutputs) else StructuredOutputs.parse(value)
    if name == "top_k" and value in (-1, "-1"):
        return 0
    if name == "seed" and value in (-1, "-1"):
        return None
    return value
