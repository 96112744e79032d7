"""Several prompts in one request, and the end of requests by their id, through the real server."""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.server.clients import GrpcStream, generate, generate_stream, grpc, metrics, post
from support.waiting import until
from tritonclient.utils import InferenceServerException

from nanoflow_backend.engine import SamplingParams

GREEDY = {"temperature": 0.0, "max_tokens": 24}
PROMPTS = ["Write a string", "Return", "The file is", "Return a list of all the current frames. A", "Raise"]
COUNTS = {"return_num_output_tokens": True, "return_total_output_tokens": True, "return_finish_reason": True}
LONG = {"stream": True, "sampling_parameters": json.dumps({"max_tokens": 1500, "ignore_eos": True})}


@pytest.fixture(scope="module")
def expected(demo_llm):
    return demo_llm.generate(PROMPTS, SamplingParams(**GREEDY))


def test_prompts_come_back_in_their_order(demo, expected):
    request = {"prompts": PROMPTS, "return_output_ids": True, **COUNTS}
    answer = generate(demo.http_url, "nanoflow", **request, exclude_input_in_output=True, **GREEDY)
    assert answer["text_output"] == [completion.text for completion in expected]
    assert answer["output_ids"] == list(itertools.chain(*(completion.token_ids for completion in expected)))
    lengths = [len(completion.token_ids) for completion in expected]
    assert (answer["num_output_tokens"], answer["total_output_tokens"]) == (lengths, lengths)
    assert answer["finish_reason"] == [str(completion.finish_reason) for completion in expected]
    assert answer["batch_index"] == list(range(len(PROMPTS)))
    with_prompts = generate(demo.http_url, "nanoflow", prompts=PROMPTS[:2], **GREEDY)
    assert with_prompts["text_output"] == [PROMPTS[i] + expected[i].text for i in range(2)]


@pytest.mark.parametrize("over", ["gRPC", "HTTP"])
def test_prompts_share_a_stream(demo, expected, over):
    if over == "gRPC":
        sampling = json.dumps(GREEDY)
        responses = grpc(
            demo.grpc_url, "nanoflow", prompts=PROMPTS, stream=True, sampling_parameters=sampling, **COUNTS
        )
    else:
        responses = generate_stream(demo.http_url, "nanoflow", prompts=PROMPTS, stream=True, **GREEDY, **COUNTS)
    for index, completion in enumerate(expected):
        own = [response for response in responses if response["batch_index"] == index]
        assert "".join(response["text_output"] for response in own) == completion.text
        assert [response["finish_reason"] for response in own[:-1]] == ["None"] * (len(own) - 1)
        assert own[-1]["finish_reason"] == str(completion.finish_reason)
        assert own[-1]["total_output_tokens"] == sum(response["num_output_tokens"] for response in own)


def test_each_prompt_has_its_n_sequences(demo, demo_llm):
    params = {"max_tokens": 8, "seed": 5, "n": 2}
    expected = demo_llm.generate(PROMPTS[:3], SamplingParams(**params))
    request = {"prompts": PROMPTS[:3], "exclude_input_in_output": True, "return_num_output_tokens": True, **params}
    answer = generate(demo.http_url, "nanoflow", **request)
    assert len(answer["text_output"]) == len(answer["num_output_tokens"]) == 6
    assert answer["batch_index"] == [0, 1, 2]
    assert answer["text_output"] == [completion.text for completion in expected]


def test_ids_of_several_prompts(demo, demo_llm):
    prompts = [[5, 6, 7], [8], [9, 10]]
    expected = demo_llm.generate(prompts, SamplingParams(**GREEDY))
    request = {"input_ids": list(itertools.chain(*prompts)), "input_lengths": [len(prompt) for prompt in prompts]}
    answer = generate(demo.http_url, "nanoflow", **request, **GREEDY)
    assert answer["output_ids"] == list(itertools.chain(*(completion.token_ids for completion in expected)))
    assert answer["num_output_tokens"] == [len(completion.token_ids) for completion in expected]
    assert answer["text_output"] == [completion.text for completion in expected]


def test_one_bad_prompt_fails_the_request_and_no_other(demo, expected):
    """The engine refuses the third prompt, when the others run already."""
    prompts = [[5] * 10, [6] * 10, [7] * 4000]
    request = {"input_ids": list(itertools.chain(*prompts)), "input_lengths": [10, 10, 4000], "max_tokens": 1500}
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(generate, demo.http_url, "nanoflow", text_input=PROMPTS[0], **GREEDY)
        status, text = post(demo.http_url, "nanoflow", "generate", {**request, "ignore_eos": True})
        assert status == 400
        assert "prompt: expected at most" in text
        assert other.result()["text_output"] == PROMPTS[0] + expected[0].text
    until(lambda: metrics(demo.metrics_url, "nanoflow")["nanoflow_num_requests_running"] == 0)


def cancel(demo, name):
    return generate(demo.http_url, "nanoflow", id=name, cancel=True)["num_cancelled"]


def test_cancel_by_request_id(demo):
    """A gRPC stream, a whole answer over HTTP, and a batch; another request with another id goes on."""
    streams = [
        GrpcStream(demo.grpc_url, "nanoflow", text_input="Write", request_id="mine", **LONG),
        GrpcStream(demo.grpc_url, "nanoflow", prompts=PROMPTS[:3], request_id="mine", **LONG),
        GrpcStream(demo.grpc_url, "nanoflow", text_input="Write", request_id="other", **LONG),
    ]
    for stream in streams:
        next(iter(stream))
    whole = {"id": "mine", "text_input": "Write", "max_tokens": 1500, "ignore_eos": True, "return_finish_reason": True}
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(generate, demo.http_url, "nanoflow", **whole)
        until(lambda: metrics(demo.metrics_url, "nanoflow")["nanoflow_num_requests_running"] == 6)
        assert cancel(demo, "mine") == 5
        for stream in streams[:2]:
            with pytest.raises(InferenceServerException, match="the request was cancelled"):
                list(stream)
        answer = posted.result()
    assert answer["finish_reason"] == "cancelled"
    assert answer["text_output"].startswith("Write")
    until(lambda: cancel(demo, "mine") == 0)  # one whose last response is on its way still counts
    next(iter(streams[2]))
    (answer,) = grpc(demo.grpc_url, "nanoflow", cancel=True, request_id="other")
    assert answer == {"num_cancelled": 1}
    for stream in streams:
        stream.close(cancel=True)
    until(lambda: metrics(demo.metrics_url, "nanoflow")["nanoflow_num_requests_running"] == 0)
