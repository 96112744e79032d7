"""SamplingParams.parse: the spellings of clients, and a name in every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow_backend.scheduler.sampling_params import InvalidRequest, SamplingParams

# The fields of vLLM's SamplingParams that a client may set, old ones too, each with a value that asks for something.
VLLM_NAMES: dict[str, Any] = {
    "best_of": 2,
    "detokenize": False,
    "early_stopping": True,
    "extra_args": {"x": 1},
    "flat_logprobs": True,
    "length_penalty": 2,
    "logits_processors": ["x"],
    "logprob_token_ids": [1],
    "output_kind": 7,
    "prompt_logprob_start": 1,
    "prompt_logprob_token_ids": [1],
    "repetition_detection": {"min_count": 2},
    "routed_experts_prompt_start": 3,
    "skip_clone": True,
    "skip_reading_prefix_cache": True,
    "spaces_between_special_tokens": False,
    "stream_interval": 8,
    "thinking_token_budget": 100,
    "trace_decode_token_ids": [1],
    "truncate_prompt_tokens": 4,
    "use_beam_search": True,
}


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_what_is_not_implemented_is_refused_by_name_and_neutral_values_are_not(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: not implemented; expected its neutral value"):
        SamplingParams.parse({name: VLLM_NAMES[name]})
    assert SamplingParams.parse({name: None}) == SamplingParams()


def test_neutral_values_may_be_spelled_as_text() -> None:
    neutral = {"n": "1", "presence_penalty": 0.0, "min_p": "0", "use_beam_search": "false", "repetition_penalty": "1.0"}
    assert SamplingParams.parse({**neutral, "thinking_token_budget": -1}) == SamplingParams()


def test_no_max_tokens_is_no_limit_but_the_models() -> None:
    assert SamplingParams.parse({"max_tokens": None}).max_tokens == 2**31 - 1
    assert SamplingParams.parse({}).max_tokens == 16


def test_the_spellings_of_clients() -> None:
    fields = {"max_tokens": "128", "temperature": "0.5", "top_k": "-1", "seed": 7, "stop": "x", "stop_token_ids": 5}
    parsed = SamplingParams.parse({**fields, "ignore_eos": "true", "logprobs": None, "min_tokens": None})
    expected = {"max_tokens": 128, "temperature": 0.5, "seed": 7, "stop": ("x",), "stop_token_ids": (5,)}
    assert parsed == SamplingParams(**expected, ignore_eos=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temprature": 1}, "temprature: unknown sampling parameter; known are max_tokens"),
        ({"max_tokens": 0}, r"max_tokens: expected an integer in 1\.\.2\^31-1, got 0"),
        ({"max_tokens": 2**31}, "max_tokens: expected"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens: expected an integer in 0\.\.4 \(max_tokens\), got 5"),
        ({"temperature": -0.1}, "temperature: expected a finite number >= 0, got -0.1"),
        ({"temperature": "nan"}, "temperature: expected a finite number"),
        ({"top_k": -2}, "top_k: expected"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_p": 1.01}, "top_p: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"seed": 2**63}, "seed: expected"),
        ({"stop": ["a", ""]}, "stop: expected non-empty strings"),
        ({"stop": ["a", 5]}, r"stop\[1\]: Expected `str`, got `int`"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: expected token ids >= 0"),
        ({"logprobs": 21}, r"logprobs: expected an integer in 0\.\.20, got 21"),
        ({"ignore_eos": "maybe"}, "ignore_eos: Expected `bool`"),
    ],
)
def test_a_bad_value_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        SamplingParams.parse(fields)
