"""A checkpoint behind the real server says the same tokens as the engine alone."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.server.clients import generate, generate_stream, grpc
from support.server.requests import COUNTS, GREEDY, WORDS

from nanoflow_backend.engine import SamplingParams


def test_64_grpc_streams_give_the_engines_tokens(served, prompts, expected):
    def run(prompt):
        sampling = json.dumps(GREEDY)
        flags = {"stream": True, "return_output_ids": True, **COUNTS}
        return grpc(served.grpc_url, "nanoflow", text_input=prompt, sampling_parameters=sampling, **flags)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(run, prompts))
    for responses, completion in zip(answers, expected, strict=True):
        ids = [r["output_ids"] if isinstance(r["output_ids"], list) else [r["output_ids"]] for r in responses]
        assert list(itertools.chain(*ids)) == completion.token_ids
        assert "".join(r["text_output"] for r in responses) == completion.text
        assert [r["finish_reason"] for r in responses] == ["None"] * (len(responses) - 1) + ["length"]
        assert [r.get("total_output_tokens") for r in responses] == [None] * (len(responses) - 1) + [24]


def test_64_http_clients_give_the_engines_tokens(served, prompts, expected):
    def run(prompt):
        return generate(
            served.http_url, "nanoflow", text_input=prompt, return_output_ids=True, id="a client's", **GREEDY
        )

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(run, prompts))
    for answer, prompt, completion in zip(answers, prompts, expected, strict=True):
        assert answer["output_ids"] == completion.token_ids
        assert answer["text_output"] == prompt + completion.text


def is_whole(events):
    """The rule for clients of `generate_stream`."""
    totals = [event["total_output_tokens"] for event in events if "total_output_tokens" in event]
    return totals == [sum(event["num_output_tokens"] for event in events)]


def test_any_lost_event_of_an_http_stream_is_detectable(served, prompts, expected):
    request = {"text_input": prompts[0], "stream": True, **GREEDY, **COUNTS}
    events = generate_stream(served.http_url, "nanoflow", **request)
    assert "".join(event["text_output"] for event in events) == expected[0].text
    assert len(events) > 3
    assert is_whole(events)
    for count in (1, 2, 3):
        for lost in itertools.combinations(range(len(events)), count):
            assert not is_whole([event for index, event in enumerate(events) if index not in lost])
    assert not is_whole(events[:-1])


def test_a_request_of_a_vllm_client_works_unchanged(served, prompts, llm):
    """As NVIDIA's load generator and vLLM's examples send it: numbers are strings, outputs are not named."""
    sampling = {
        "max_tokens": "16",
        "min_tokens": "16",
        "temperature": "0.0",
        "top_p": "1.0",
        "n": 1,
        "ignore_eos": True,
    }
    responses = grpc(
        served.grpc_url,
        "nanoflow",
        text_input=prompts[1],
        stream=True,
        exclude_input_in_output=True,
        sampling_parameters=json.dumps(sampling),
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        return_logprobs=True,
        return_cumulative_logprob=True,
    )
    (completion,) = llm.generate([prompts[1]], SamplingParams(temperature=0, max_tokens=16, logprobs=0))
    assert "".join(r["text_output"] for r in responses) == completion.text
    assert {r["num_input_tokens"] for r in responses} == {completion.num_input_tokens}
    assert sum(r["num_output_tokens"] for r in responses) == 16
    assert {r["logprobs"] for r in responses} == {"null"}
    logprob = sum(entry.logprobs[0] for entry in completion.logprobs)
    assert responses[-1]["cumulative_logprob"] == pytest.approx(logprob, rel=1e-4)
    assert responses[-1]["finish_reason"] == "length"


def test_stop_strings_and_logprobs_over_http(served, prompts, expected):
    text = expected[2].text
    stop = text[len(text) // 2 :][:3]
    request = {"text_input": prompts[2], **GREEDY, "logprobs": 2, "exclude_input_in_output": True}
    flags = {f"return_{name}": True for name in ("finish_reason", "stop_reason", "logprobs", "output_ids")}
    answer = generate(served.http_url, "nanoflow", stop=["never there", stop], **request, **flags)
    assert answer["text_output"] == text[: text.find(stop)]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", stop)
    described = json.loads(answer["logprobs"])
    assert [next(iter(entry)) for entry in described] == [str(i) for i in answer["output_ids"]]
    assert all(len(entry) == 2 for entry in described)  # greedy: the sampled token is one of the two most likely
    assert all(entry[next(iter(entry))]["rank"] == 1 for entry in described)


def test_shared_prefixes_are_reported(served):
    request = {"text_input": " ".join(WORDS * 3), "return_num_cached_tokens": True, "return_num_input_tokens": True}
    answers = [generate(served.http_url, "nanoflow", **request, **GREEDY) for _ in range(2)]
    assert answers[1]["num_cached_tokens"] > 0
    assert answers[1]["num_cached_tokens"] < answers[1]["num_input_tokens"]
    assert answers[0]["text_output"] == answers[1]["text_output"]


def test_a_model_without_tokenizer_continues_ids(served, llm):
    prompt = [5, 6, 7, 8]
    (completion,) = llm.generate([prompt], SamplingParams(**GREEDY))
    answer = generate(served.http_url, "narrow", input_ids=prompt, **GREEDY)
    assert (answer["output_ids"], "text_output" in answer) == (completion.token_ids, False)
    both = generate(served.http_url, "nanoflow", input_ids=prompt, **GREEDY)
    assert (both["output_ids"], both["text_output"]) == (completion.token_ids, completion.text)
    assert grpc(served.grpc_url, "nanoflow", input_ids=prompt, outputs=["num_input_tokens"]) == [
        {"num_input_tokens": 4}
    ]
