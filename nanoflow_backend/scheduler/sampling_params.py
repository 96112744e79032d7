"""SamplingParams: what a client may ask of sampling, under the names that vLLM made common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

MOST_TOKENS = 2**31 - 1
MOST_STOPS = 256
MOST_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20  # as many alternatives per token as other servers return by default


class InvalidRequest(ValueError):
    """The caller's fault: the message names the field and what was expected."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How one request is sampled and when it stops.

    temperature 0 is greedy; top_k 0 and top_p 1 are off; `logprobs` n returns the n most likely tokens beside
    the sampled one. A seed makes a request reproducible whatever batch it runs in.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

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
        require(self.seed is None or 0 <= self.seed < 2**63, "seed", "an integer in 0..2^63-1")
        require(all(self.stop), "stop", "non-empty strings")
        stops_ok = len(self.stop) <= MOST_STOPS and all(len(text) <= MOST_STOP_CHARACTERS for text in self.stop)
        require(stops_ok, "stop", f"at most {MOST_STOPS} strings of at most {MOST_STOP_CHARACTERS} characters")
        require(len(self.stop_token_ids) <= MOST_STOPS, "stop_token_ids", f"at most {MOST_STOPS}")
        require(all(0 <= i < 2**31 for i in self.stop_token_ids), "stop_token_ids", "token ids >= 0")
        logprobs_ok = self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS
        require(logprobs_ok, "logprobs", f"an integer in 0..{MAX_LOGPROBS}")

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Build from a client's mapping: numbers may be strings ("128"), `stop` may be one string.

        Every vLLM SamplingParams name is recognised. A name that is not implemented yet is accepted at its
        neutral value (None is one for all) and refused otherwise.

        Raises:
            InvalidRequest: naming the field and what was expected.
        """
        known: dict[str, Any] = {}
        for name, value in fields.items():
            if name in cls.__struct_fields__:
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
            reason, _, path = str(error).partition(" - at `$.")
            raise InvalidRequest(f"{path.rstrip('`') or 'sampling parameters'}: {reason}") from None


# The other vLLM names with the values that mean "not used", as they come from JSON, gRPC strings or tensors.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1, "1"),
    "best_of": (None, 1, "1"),
    "presence_penalty": (0, "0", "0.0"),
    "frequency_penalty": (0, "0", "0.0"),
    "repetition_penalty": (1, "1", "1.0"),
    "length_penalty": (1, "1", "1.0"),
    "min_p": (0, "0", "0.0"),
    "early_stopping": (False, "false"),
    "use_beam_search": (False, "false"),
    "detokenize": (True, "true"),
    "spaces_between_special_tokens": (True, "true"),
    "flat_logprobs": (False, "false"),
    "skip_clone": (False, "false"),
    "skip_reading_prefix_cache": (None, False, "false"),
    "routed_experts_prompt_start": (0, "0"),
    "thinking_token_budget": (None, -1, "-1"),
    "repetition_detection": (None,),
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None,),
    "stream_interval": (None, 1, "1"),
    "trace_decode_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "logits_processors": (None, []),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None, []),
    "bad_words": (None, []),
    "guided_decoding": (None,),
    "structured_outputs": (None,),
    "extra_args": (None, {}),
    "output_kind": (None, 0, 1, 2, "0", "1", "2"),  # how vLLM returns text; here the `stream` input decides
}


DEFAULTS = dict(zip(SamplingParams.__struct_fields__, SamplingParams.__struct_defaults__, strict=True))


def _normalise(name: str, value: Any) -> Any:
    """The spellings clients use: one stop string, -1 for "all tokens", None for "the default" (of max_tokens: no limit
    but the model's, as in vLLM)."""
    if value is None:
        return MOST_TOKENS if name == "max_tokens" else DEFAULTS[name]
    if name == "stop" and isinstance(value, str):
        return (value,)
    if name == "stop_token_ids" and isinstance(value, int):
        return (value,)
    if name == "top_k" and value in (-1, "-1"):
        return 0
    return value
