"""A request of the server becomes calls of the engine, or is refused with the field named."""

import contextlib
import json

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.serving.parsed_call import LIMITS, parse, tensor

from nanoflow_backend.process.messages import Submit
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import InvalidRequest, SamplingParams
from nanoflow_backend.scheduler.batch import FinishReason
from nanoflow_backend.serving.call import ALL_OUTPUTS, Call, first_timeout


def test_a_bare_prompt(tokenizer):
    call = parse(tokenizer, text_input="the dog")
    assert call.prompt == tokenizer.encode("the dog")
    assert call.params == SamplingParams()
    assert not call.stream
    assert call.shown_prompt == "the dog"
    assert call.outputs == {"text_output"}


@pytest.mark.parametrize(
    ("exclude", "stream", "shown"),
    [
        (None, None, "the dog"),
        (None, False, "the dog"),
        (None, True, ""),
        (True, False, ""),
        (True, True, ""),
        (False, False, "the dog"),
    ],
)
def test_exclude_input_in_output_as_in_the_vllm_backend(tokenizer, exclude, stream, shown):
    flags = {"exclude_input_in_output": exclude, "stream": stream}
    given = {name: value for name, value in flags.items() if value is not None}
    call = parse(tokenizer, text_input="the dog", **given)
    assert (call.shown_prompt, call.stream) == (shown, bool(stream))


def test_ids_are_taken_as_they_are_and_come_back_as_ids(tokenizer):
    call = parse(tokenizer, input_ids=[5, 0, 7])
    assert call.prompt == [5, 0, 7]
    assert call.shown_prompt == ""
    assert call.outputs == {"text_output", "output_ids"}
    assert parse(None, input_ids=[5]).outputs == {"output_ids"}


def test_several_prompts_are_several_calls(tokenizer):
    calls = parse(tokenizer, prompts=["the dog", "a", "the dog"], sampling_parameters={"max_tokens": 3})
    assert [call.prompt for call in calls] == [tokenizer.encode(text) for text in ("the dog", "a", "the dog")]
    assert [call.shown_prompt for call in calls] == ["the dog", "a", "the dog"]
    assert [call.batch_index for call in calls] == [0, 1, 2]
    assert [call.params for call in calls] == [SamplingParams(max_tokens=3)] * 3
    assert {call.outputs for call in calls} == {frozenset({"text_output", "batch_index"})}
    assert [call.batch_index for call in parse(tokenizer, prompts=["a"])] == [0]
    assert parse(tokenizer, text_input="a").batch_index is None


def test_ids_are_several_prompts_by_their_lengths(tokenizer):
    calls = parse(tokenizer, input_ids=[5, 6, 7, 8, 9, 10], input_lengths=[3, 1, 2])
    assert [call.prompt for call in calls] == [[5, 6, 7], [8], [9, 10]]
    expected = frozenset({"text_output", "output_ids", "num_output_tokens", "batch_index"})
    assert {call.outputs for call in calls} == {expected}


def test_outputs_are_switched_on_or_requested_by_name(tokenizer):
    assert parse(tokenizer, text_input="a", return_finish_reason=True, return_logprobs=False).outputs == {
        "text_output",
        "finish_reason",
    }
    assert parse(tokenizer, text_input="a", requested=["output_ids", "stop_reason"]).outputs == {
        "output_ids",
        "stop_reason",
    }
    # Not requested, so not sent though it is switched on: the server would drop it.
    assert parse(tokenizer, text_input="a", requested=["text_output"], return_logprobs=True).outputs == {"text_output"}


def test_sampling_parameters_come_from_three_places(tokenizer):
    call = parse(
        tokenizer,
        text_input="a",
        sampling_parameters={"max_tokens": "128", "temperature": "0.5", "stop": "x"},
        parameters={"top_k": 5, "max_tokens": 128, "stop": "x"},
        stop=["x"],
    )
    assert call.params == SamplingParams(max_tokens=128, temperature=0.5, top_k=5, stop=("x",))


def test_a_cumulative_logprob_needs_logprobs_that_are_not_shown(tokenizer):
    call = parse(tokenizer, text_input="a", return_cumulative_logprob=True, return_logprobs=True)
    assert (call.params.logprobs, call.show_logprobs) == (0, False)
    call = parse(tokenizer, text_input="a", return_cumulative_logprob=True, sampling_parameters={"logprobs": 3})
    assert (call.params.logprobs, call.show_logprobs) == (3, True)


RESERVED = """id ID headers binary_data_output sequence_id sequence_start triton_enable_empty_final_response
traceparent x-request-id X-Forwarded-For grpc-timeout"""


@pytest.mark.parametrize("name", RESERVED.split())
def test_reserved_parameters_are_not_sampling(tokenizer, name):
    assert parse(tokenizer, text_input="a", parameters={name: "whatever"}).params == SamplingParams()


def test_priority_and_timeout(tokenizer):
    call = parse(tokenizer, text_input="a", parameters={"priority": "-2", "timeout": 1500})
    assert (call.priority, call.timeout_us, call.params) == (-2, 1500, SamplingParams())


def test_words_come_as_inputs_too_and_an_empty_text_is_none(tokenizer):
    """As LiteLLM sends them: a list with one empty text in every request."""
    call = parse(tokenizer, text_input="a", stop_words=["the end", ""], bad_words=[""])
    assert (call.params.stop, call.params.bad_words_token_ids) == (("the end",), ())
    listed = parse(tokenizer, text_input="a", bad_words=["dog", "fox"])
    assert listed == parse(tokenizer, text_input="a", parameters={"bad_words": '["dog", "fox"]'})
    assert parse(tokenizer, text_input="a", bad_words='["dog", "fox"]') == listed
    with pytest.raises(InvalidRequest, match=r"^stop: \['x'\] in the input stop, but 'y' in the input stop_words"):
        parse(tokenizer, text_input="a", stop="x", stop_words="y")


def test_bad_words_become_tokens(tokenizer):
    call = parse(tokenizer, text_input="a", sampling_parameters={"bad_words": ["dog"]})
    assert call.params.bad_words == ()
    assert {tokenizer.decode(list(ids)).strip() for ids in call.params.bad_words_token_ids} == {"dog"}


def test_priority_and_timeouts_may_stand_beside_sampling_parameters(tokenizer):
    assert parse(tokenizer, text_input="a", sampling_parameters={"priority": None}).priority == 0
    fields = {"priority": 3, "timeout": "9", "queue_timeout": 7, "max_tokens": 5}
    call = parse(tokenizer, text_input="a", sampling_parameters=fields, parameters={"timeout": 9})
    assert (call.priority, call.timeout_us, call.queue_timeout_us) == (3, 9, 7)
    assert call.params == SamplingParams(max_tokens=5)


@pytest.mark.parametrize(("own", "servers", "counts"), [(0, 0, 0), (7, 0, 7), (0, 9, 9), (7, 9, 7), (9, 7, 7)])
def test_the_shorter_queue_timeout_counts(tokenizer, own, servers, counts):
    limits = msgspec.structs.replace(LIMITS, max_queue_us=servers)
    call = parse(tokenizer, text_input="a", parameters={"queue_timeout": own}, limits=limits)
    assert call.queue_timeout_us == counts


@pytest.mark.parametrize(
    ("fields", "servers", "first"),
    [
        ({}, 0, None),
        ({}, 9, (9, FinishReason.QUEUE_TIMEOUT)),
        ({"timeout": 7}, 0, (7, FinishReason.DEADLINE)),
        ({"timeout": 7, "queue_timeout": 6}, 9, (6, FinishReason.QUEUE_TIMEOUT)),
        ({"timeout": 7, "queue_timeout": 8}, 9, (7, FinishReason.DEADLINE)),
        ({"timeout": 7}, 5, (5, FinishReason.QUEUE_TIMEOUT)),
    ],
)
def test_the_first_timeout_of_a_request_that_never_begins(fields, servers, first):
    assert first_timeout({}, fields, servers) == first
    sampling = {"sampling_parameters": np.array([json.dumps(fields).encode()], np.object_)}
    assert first_timeout(sampling, {}, servers) == first


REFUSED = {
    "no prompt": ({}, "text_input, prompts, input_ids, messages: expected one of them, got none"),
    "two prompts": ({"text_input": "a", "input_ids": [1]}, "expected one of them, got text_input and input_ids"),
    "no ids": ({"input_ids": []}, "input_ids: expected at least one token"),
    "id too high": ({"input_ids": [1, 400]}, r"input_ids: expected ids in 0\.\.399, got 1\.\.400"),
    "id negative": ({"input_ids": [-1, 2]}, r"input_ids: expected ids in 0\.\.399, got -1\.\.2"),
    "text not UTF-8": ({"text_input": b"\xff\xfe"}, "text_input: expected UTF-8 text: .*0xff"),
    "two texts": ({"text_input": ["a", "b"]}, r"text_input: expected one element, got shape \[2\]"),
    "no prompts": ({"prompts": []}, "prompts: expected at least one prompt, got none"),
    "prompts and a prompt": ({"text_input": "a", "prompts": ["a"]}, "got text_input and prompts"),
    "lengths of text": ({"text_input": "a", "input_lengths": [1]}, "input_lengths: expected input_ids with them"),
    "lengths too short": (
        {"input_ids": [1, 2, 3], "input_lengths": [1, 1]},
        r"input_lengths: expected lengths >= 1 with a sum of 3 \(input_ids\), got \[1, 1\]",
    ),
    "length 0": ({"input_ids": [1], "input_lengths": [0, 1]}, "input_lengths: expected lengths >= 1"),
    "length negative": ({"input_ids": [1], "input_lengths": [2, -1]}, "input_lengths: expected lengths >= 1"),
    "no lengths": ({"input_ids": [1], "input_lengths": []}, "input_lengths: expected lengths >= 1"),
    "two flags": ({"text_input": "a", "stream": [True, False]}, "stream: expected one element"),
    "prompt in a stream": (
        {"text_input": "a", "stream": True, "exclude_input_in_output": False},
        "exclude_input_in_output: expected true, or nothing, when streaming",
    ),
    "prompt of ids": (
        {"input_ids": [1], "exclude_input_in_output": False},
        "exclude_input_in_output: expected true, or nothing, with input_ids",
    ),
    "not JSON": ({"text_input": "a", "sampling_parameters": "max_tokens=5"}, "sampling_parameters: not valid JSON"),
    "deep JSON": ({"text_input": "a", "sampling_parameters": "[" * 100_000}, "sampling_parameters: not valid JSON"),
    "JSON list": ({"text_input": "a", "sampling_parameters": "[5]"}, r"expected a JSON object, got \[5\]"),
    "unknown name": ({"text_input": "a", "parameters": {"max_token": 5}}, "max_token: unknown sampling parameter"),
    "a list as number": ({"text_input": "a", "sampling_parameters": {"max_tokens": [5]}}, "max_tokens: Expected `int`"),
    "word as number": ({"text_input": "a", "sampling_parameters": {"top_p": "high"}}, "top_p: Expected `float`"),
    "out of range": ({"text_input": "a", "parameters": {"temperature": -1.0}}, "temperature: expected .* got -1.0"),
    "not a number": ({"text_input": "a", "sampling_parameters": '{"temperature": NaN}'}, "temperature: expected"),
    "far too many": ({"text_input": "a", "parameters": {"max_tokens": 10**30}}, "max_tokens: "),
    "endless": ({"text_input": "a", "sampling_parameters": '{"max_tokens": 1e999}'}, "max_tokens: "),
    "not implemented": ({"text_input": "a", "parameters": {"best_of": 2}}, "best_of: not implemented; .* got 2"),
    "twice": (
        {"text_input": "a", "sampling_parameters": {"seed": 1}, "parameters": {"seed": 2}},
        "seed: 1 in sampling_parameters, but 2 in the request's parameters",
    ),
    "two stops": (
        {"text_input": "a", "sampling_parameters": {"stop": ["x"]}, "stop": ["x", "y"]},
        r"stop: \['x'\] in sampling_parameters, but \['x', 'y'\] in the input stop",
    ),
    "empty stop": ({"text_input": "a", "stop": [""]}, "stop: expected non-empty strings"),
    "half a character": (
        {"text_input": "a", "sampling_parameters": {"stop": "\ud800"}},
        "stop: expected valid Unicode",
    ),
    "stop not UTF-8": ({"text_input": "a", "stop": [b"\xff"]}, "stop: expected UTF-8 text"),
    "queue_timeout": ({"text_input": "a", "parameters": {"queue_timeout": -1}}, "queue_timeout: expected .* got -1"),
    "priority": ({"text_input": "a", "parameters": {"priority": "high"}}, "priority: expected an integer in .* 'high'"),
    "timeout": ({"text_input": "a", "parameters": {"timeout": -1}}, r"timeout: expected an integer in 0\.\..* got -1"),
}


@pytest.mark.parametrize(("request_", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_field_named(tokenizer, request_, message):
    with pytest.raises(InvalidRequest, match=message):
        parse(tokenizer, **request_)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"text_input": "a"}, r"text_input: expected none, for the model has no tokenizer\.json \(use input_ids\)"),
        ({"input_ids": [1], "stop": ["x"]}, r"stop: expected none, .* no tokenizer\.json \(use stop_token_ids\)"),
        ({"input_ids": [1], "requested": ["text_output"]}, r"text_output: .* no tokenizer\.json"),
    ],
)
def test_text_needs_a_tokenizer(request_, message):
    with pytest.raises(InvalidRequest, match=message):
        parse(None, **request_)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3))


names = st.sampled_from([*SamplingParams.__struct_fields__, "n", "min_p", "logit_bias"]) | st.text(max_size=8)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(sampling=st.dictionaries(names, values, max_size=4), parameters=st.dictionaries(names, scalars, max_size=3))
def test_any_json_is_refused_or_can_be_sent_to_the_engine(tokenizer, sampling, parameters):
    with contextlib.suppress(InvalidRequest):
        call = parse(tokenizer, text_input="a", sampling_parameters=json.dumps(sampling), parameters=parameters)
        request = Request(1, call.prompt, call.params)
        encoded = msgspec.msgpack.encode(Submit((request,)))
        assert msgspec.msgpack.decode(encoded, type=Submit).requests == (request,)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.binary(max_size=40).filter(lambda text: not text.lstrip().startswith(b"{")))
def test_bytes_that_are_no_object_are_refused(tokenizer, text):
    tensors = {"text_input": tensor("text_input", "a"), "sampling_parameters": tensor("sampling_parameters", text)}
    with pytest.raises(InvalidRequest, match="sampling_parameters"):
        Call.parse(tensors, {}, ALL_OUTPUTS, tokenizer, LIMITS)
