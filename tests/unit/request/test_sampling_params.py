"""SamplingParams.parse: the spellings of clients, and a name in every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.request.structured_outputs import StructuredOutputs

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
    "lora_name": "french",
    "output_kind": 7,
    "output_text_buffer_length": 3,
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


# What vLLM 0.26's SamplingParams and vllm_backend's own field say where a client has set nothing. Names that begin with
# "_" are vLLM's own.
VLLM_DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "logprob_token_ids": None,
    "flat_logprobs": False,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "output_kind": 0,
    "skip_clone": False,
    "output_text_buffer_length": 0,
    "structured_outputs": None,
    "logit_bias": None,
    "allowed_token_ids": None,
    "extra_args": None,
    "routed_experts_prompt_start": 0,
    "bad_words": [],
    "skip_reading_prefix_cache": None,
    "thinking_token_budget": None,
    "repetition_detection": None,
    "lora_name": None,
}


def test_every_field_of_vllm_is_accepted_at_its_default() -> None:
    assert SamplingParams.parse(VLLM_DEFAULTS) == SamplingParams()


@pytest.mark.parametrize("seed", [-1, "-1"])
def test_a_seed_of_minus_one_is_none(seed: Any) -> None:
    assert SamplingParams.parse({"seed": seed}).seed is None


def test_neutral_options_of_structured_outputs_are_accepted() -> None:
    neutral = {"disable_fallback": True, "disable_additional_properties": "false", "structural_tag": None}
    assert SamplingParams.parse({"structured_outputs": {"regex": "x", **neutral}}).structured_outputs == (
        StructuredOutputs(regex="x")
    )


def test_what_clients_write_as_json_text_is_read() -> None:
    """Request parameters of the server are numbers and texts."""
    as_text = {"logit_bias": '{"5": -1.5}', "bad_words": '["a b", "c"]', "structured_outputs": '{"choice": ["x"]}'}
    as_json = {"logit_bias": {"5": -1.5}, "bad_words": ["a b", "c"], "structured_outputs": {"choice": ["x"]}}
    assert SamplingParams.parse(as_text) == SamplingParams.parse(as_json)
    assert SamplingParams.parse({"bad_words": "one word"}).bad_words == ("one word",)
    assert SamplingParams.parse({"logit_bias": {5: "2"}}).logit_bias == {5: 2.0}


@pytest.mark.parametrize(
    ("fields", "outputs"),
    [
        ({"structured_outputs": {"json": {"a": 1}}}, StructuredOutputs(json='{"a":1}')),
        ({"structured_outputs": {"json": '{"a": 1}', "regex": None}}, StructuredOutputs(json='{"a": 1}')),
        ({"structured_outputs": {"json_object": "true"}}, StructuredOutputs(json_object=True)),
        ({"structured_outputs": {"regex": "x", "json_object": False}}, StructuredOutputs(regex="x")),
        ({"guided_json": {"a": 1}}, StructuredOutputs(json='{"a":1}')),
        ({"guided_choice": '["a", "b"]', "guided_regex": None}, StructuredOutputs(choice=("a", "b"))),
        ({"guided_grammar": "start: x", "guided_decoding_backend": "auto"}, StructuredOutputs(grammar="start: x")),
        ({"guided_decoding": '{"regex": "x", "backend": "auto"}'}, StructuredOutputs(regex="x")),
        ({"guided_decoding": None, "guided_json_object": False}, None),
    ],
)
def test_structured_outputs_under_all_their_names(fields: dict[str, Any], outputs: StructuredOutputs | None) -> None:
    assert SamplingParams.parse(fields).structured_outputs == outputs


def test_each_sequence_has_its_seed_and_one_scores_the_prompt() -> None:
    params = SamplingParams(n=3, seed=2**63 - 2, prompt_logprobs=1, top_k=4)
    assert [params.of_sequence(i).seed for i in range(3)] == [2**63 - 2, 2**63 - 1, 0]
    assert [params.of_sequence(i).prompt_logprobs for i in range(3)] == [1, None, None]
    assert params.of_sequence(1) == SamplingParams(seed=2**63 - 1, top_k=4)
    assert SamplingParams(n=2).of_sequence(1).seed is None


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
        ({"min_p": 1.1}, r"min_p: expected a number in \[0, 1\], got 1.1"),
        ({"n": 129}, "n: expected an integer in 1..128, got 129"),
        ({"n": 2, "temperature": 0}, "n: expected 1 where temperature is 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a finite number > 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty: expected a finite number > 0"),
        ({"presence_penalty": 2.1}, r"presence_penalty: expected a number in \[-2, 2\]"),
        ({"frequency_penalty": float("nan")}, r"frequency_penalty: expected a number in \[-2, 2\]"),
        ({"logit_bias": dict.fromkeys(range(301), 1)}, "logit_bias: expected at most 300 token ids"),
        ({"logit_bias": {"5": 100.5}}, r"logit_bias: expected token ids >= 0 with numbers in \[-100, 100\]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: expected token ids >= 0"),
        ({"logit_bias": {"five": 1}}, "logit_bias: Expected `int`"),
        ({"logit_bias": "{5"}, "logit_bias: not valid JSON"),
        ({"bad_words": [""]}, "bad_words: expected texts that are not empty"),
        ({"bad_words": ["x"] * 1001}, "bad_words: expected at most 1000"),
        ({"bad_words_token_ids": [[1], []]}, "bad_words_token_ids: expected lists of token ids >= 0"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids: expected token ids >= 0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs: expected an integer in 0..20"),
        ({"structured_outputs": {}}, "structured_outputs: expected exactly one of json, .*, got none"),
        ({"structured_outputs": {"json": "{}", "regex": "x"}}, "structured_outputs: expected .*, got json, regex"),
        ({"structured_outputs": "[1]"}, "structured_outputs: expected an object"),
        ({"structured_outputs": {"xml": "x"}}, "structured_outputs: Object contains unknown field `xml`"),
        ({"structured_outputs": {"choice": [1]}}, r"structured_outputs.choice\[0\]: Expected `str`"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice: expected it not to be empty"),
        ({"structured_outputs": {"regex": "x" * 65537}}, "structured_outputs.regex: expected at most 65536 characters"),
        ({"structured_outputs": {"regex": "\ud800"}}, "structured_outputs.regex: expected valid Unicode"),
        ({"structured_outputs": {"json": {"\ud800": 1}}}, "structured_outputs.json: expected a JSON schema"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag: not implemented"),
        ({"guided_json": {"a": 1}, "guided_regex": "x"}, "structured_outputs: expected exactly one"),
        ({"guided_regex": "x", "structured_outputs": {"regex": "x"}}, "structured_outputs: expected it alone"),
        ({"guided_by": "x"}, "guided_by: unknown sampling parameter"),
        ({"temprature": 1}, "temprature: unknown sampling parameter; known are max_tokens"),
        ({"max_tokens": 0}, r"max_tokens: expected an integer in 1\.\.2\^31-1, got 0"),
        ({"max_tokens": 2**31}, "max_tokens: expected"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens: expected an integer in 0\.\.4 \(max_tokens\), got 5"),
        ({"temperature": -0.1}, "temperature: expected a finite number >= 0, got -0.1"),
        ({"temperature": "nan"}, "temperature: expected a finite number"),
        ({"top_k": -2}, "top_k: expected"),
        ({"top_p": 0}, r"top_p: expected a number in \(0, 1\], got 0"),
        ({"top_p": 1.01}, "top_p: expected"),
        ({"seed": -2}, "seed: expected"),
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
