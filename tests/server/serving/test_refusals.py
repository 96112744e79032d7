"""What the real server refuses, and what clients give up, disturbs nobody else."""

import contextlib
import http.client
import json
import re
from concurrent.futures import ThreadPoolExecutor

from support.server.clients import GrpcStream, generate, grpc, metrics, post
from support.server.requests import GREEDY, A, refused
from support.waiting import until

from nanoflow_backend.engine import SamplingParams

USED_PAGES = 'nanoflow_kv_cache_pages{state="used",tier="device"}'


# Over HTTP: body -> message. This server's `generate` says 400 for every error of a model, 500 for its own.
MALFORMED = {
    "no prompt": ({}, "text_input, prompts, input_ids, messages: expected one of them, got none"),
    "two prompts": ({**A, "input_ids": [1]}, "expected one of them, got text_input and input_ids"),
    "no JSON": (b'{"text_input": "a"', "failed to parse the request JSON buffer"),
    "two texts": ({"text_input": ["a", "b"]}, "text_input"),
    "number as text": ({"text_input": 5}, "JSON non-string"),
    "no ids": ({"input_ids": []}, "input_ids"),
    "id too high": ({"input_ids": [1, 99999]}, r"input_ids: expected ids in 0\.\.\d+, got 1\.\.99999"),
    "id negative": ({"input_ids": [-1]}, "input_ids: expected ids in .* got -1"),
    "too long": ({"input_ids": [5] * 5000}, "prompt: expected at most 4095 tokens .* got 5000"),
    "more than can wait": (
        {"prompts": ["a"] * 2049, "n": 2},
        r"prompts x n: expected at most 4096 \(max_queue_size\), got 4098",
    ),
    "prompts too long": ({"prompts": ["dog " * 16384] * 50}, "prompt: expected at most 4095 tokens .* in prompt 0"),
    "a megabyte of bad words": (
        {**A, "bad_words": ["x" * 2**20]},
        "bad_words: expected at most 1000 words .*, got 1 of at most 1048576, 1048576 together",
    ),
    "an answer too large": (
        {**A, "n": 128, "max_tokens": 4000, "logprobs": 20},
        r"answer: expected at most 536870912 bytes \(max_answer_bytes\), could be \d{10}: lower .*, logprobs \(20\)",
    ),
    "prompt in a stream": (
        {**A, "stream": True, "exclude_input_in_output": False},
        "exclude_input_in_output: expected true, or nothing, when streaming",
    ),
    "stream is a word": ({**A, "stream": "yes"}, "JSON non-boolean"),
    "sampling not JSON": ({**A, "sampling_parameters": "{"}, "sampling_parameters: not valid JSON"),
    "sampling no object": ({**A, "sampling_parameters": "[1]"}, "sampling_parameters: expected a JSON object"),
    "unknown name": ({**A, "max_token": 5}, "max_token: unknown sampling parameter"),
    "max_tokens 0": ({**A, "max_tokens": 0}, "max_tokens: expected an integer in 1.* got 0"),
    "max_tokens a word": ({**A, "max_tokens": "many"}, "max_tokens: Expected `int`"),
    "min above max": ({**A, "max_tokens": 5, "min_tokens": 6}, "min_tokens: expected an integer in 0"),
    "temperature": ({**A, "temperature": -0.5}, "temperature: expected .* got -0.5"),
    "top_p": ({**A, "top_p": 1.5}, "top_p: expected .* got 1.5"),
    "top_k": ({**A, "top_k": -7}, "top_k: expected .* got -7"),
    "seed": ({**A, "seed": -2}, "seed: expected .* got -2"),
    "logprobs": ({**A, "logprobs": 1000}, "logprobs: expected .* got 1000"),
    "empty stop": ({**A, "stop": [""]}, "stop: expected non-empty strings"),
    "not implemented": ({**A, "best_of": 3}, "best_of: not implemented"),
    "a list as parameter": ({**A, "temperature": [1]}, "temperature"),
    "twice": ({**A, "sampling_parameters": '{"seed": 1}', "seed": 2}, "seed: 1 in sampling_parameters, but 2"),
    "deadline": ({**A, "max_tokens": 4000, "timeout": 1}, "timeout: not done 1 us after"),
}


def test_malformed_requests_get_their_error_while_others_go_on(served, prompts, expected):
    request = {"stream": True, "sampling_parameters": json.dumps({**GREEDY, "max_tokens": 600})}
    streams = [GrpcStream(served.grpc_url, "nanoflow", text_input=prompt, **request) for prompt in prompts[:6]]
    others = [iter(stream) for stream in streams]
    begun = [next(other)["text_output"] for other in others]
    for name, (body, message) in MALFORMED.items():
        status, text = post(served.http_url, "nanoflow", "generate", body)
        assert status in (400, 500), name
        assert re.search(message, json.loads(text)["error"]), (name, text)
    for not_utf8 in ({"text_input": b"\xff"}, {"text_input": "a", "stop": [b"\xff"]}):
        with refused(f"{list(not_utf8)[-1]}: expected UTF-8 text"):
            grpc(served.grpc_url, "nanoflow", **not_utf8)
    with refused("timeout: not done 1 us after"):
        grpc(served.grpc_url, "nanoflow", **A, parameters={"max_tokens": 4000}, timeout_us=1)
    for stream, other, first, completion in zip(streams, others, begun, expected, strict=False):
        text = first + "".join(response["text_output"] for response in other)
        assert text.startswith(completion.text[:-1])  # a last character may be incomplete
        stream.close()


def test_a_full_queue_is_unavailable(served):
    long = {"input_ids": [5, 6], "stream": True, "sampling_parameters": json.dumps({**GREEDY, "max_tokens": 4000})}
    running = GrpcStream(served.grpc_url, "narrow", **long)
    next(iter(running))
    waiting = GrpcStream(served.grpc_url, "narrow", **long)
    until(lambda: metrics(served.metrics_url, "narrow")["nanoflow_num_requests_waiting"] == 1)
    reason = "1 requests are waiting, as many as max_queue_size allows"
    with refused(reason):
        grpc(served.grpc_url, "narrow", input_ids=[5])
    for endpoint in ("generate", "generate_stream"):  # 503 is meant: docs/using.md says what a balancer does
        status, text = post(served.http_url, "narrow", endpoint, {"input_ids": [5]})
        assert (status, reason in json.loads(text.removeprefix("data: "))["error"]) == (400, True)
    for stream in (running, waiting):
        stream.close(cancel=True)
    until(lambda: metrics(served.metrics_url, "narrow")["nanoflow_num_requests_running"] == 0)
    assert generate(served.http_url, "narrow", input_ids=[5], **GREEDY)


def test_a_crowd_is_refused_while_others_run_and_whoever_comes_again_is_served(served, llm):
    """Nothing is timed: refusals are there before any of those that were let in has ended."""
    long = {"input_ids": [5, 6], "stream": True, "sampling_parameters": json.dumps({**GREEDY, "max_tokens": 4000})}
    running = GrpcStream(served.grpc_url, "narrow", **long)
    next(iter(running))
    waiting = GrpcStream(served.grpc_url, "narrow", **long)
    until(lambda: metrics(served.metrics_url, "narrow")["nanoflow_num_requests_waiting"] == 1)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: post(served.http_url, "narrow", "generate", {"input_ids": [5]}), range(40)))
    assert {status for status, _ in answers} == {400}
    assert all("1 requests are waiting, as many as max_queue_size allows" in text for _, text in answers)
    now = metrics(served.metrics_url, "narrow")
    assert (now["nanoflow_num_requests_running"], now["nanoflow_num_requests_waiting"]) == (1, 1)
    for stream in (running, waiting):
        stream.close(cancel=True)

    def come_again(prompt):
        while (answer := post(served.http_url, "narrow", "generate", {"input_ids": prompt, **GREEDY}))[0] != 200:
            assert "as many as max_queue_size allows" in answer[1]
            refusals.append(prompt)
        return json.loads(answer[1])["output_ids"]

    refusals = []
    crowd = [[5, number] for number in range(20)]
    expected = llm.generate(crowd, SamplingParams(**GREEDY))
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(come_again, crowd)) == [completion.token_ids for completion in expected]
    assert refusals


def test_who_waits_too_long_is_refused(served):
    long = {"input_ids": [5, 6], "stream": True, "sampling_parameters": json.dumps({**GREEDY, "max_tokens": 4000})}
    running = GrpcStream(served.grpc_url, "narrow", **long)
    next(iter(running))
    with refused("queue_timeout: still waiting 1000 us after the request came"):
        grpc(served.grpc_url, "narrow", input_ids=[5], parameters={"queue_timeout": 1000})
    running.close(cancel=True)
    until(lambda: metrics(served.metrics_url, "narrow")["nanoflow_num_requests_running"] == 0)


def test_200_cancels_return_every_page(served, prompts):
    sampling = json.dumps({"temperature": 1.0, "max_tokens": 4000})

    def cancel_grpc(number):
        stream = GrpcStream(
            served.grpc_url,
            "nanoflow",
            text_input=prompts[number % 64],
            stream=True,
            sampling_parameters=sampling,
        )
        responses = iter(stream)
        for _ in range(number % 5):
            next(responses)
        stream.close(cancel=True)

    def cancel_sse(number):
        with contextlib.closing(http.client.HTTPConnection(served.http_url, timeout=60)) as connection:
            body = {"text_input": prompts[number % 64], "stream": True, "max_tokens": 4000}
            connection.request("POST", "/v2/models/nanoflow/generate_stream", json.dumps(body))
            assert connection.getresponse().read(20)

    # Runs until the page, which is written now and then, has shown its pages; those of the 200 may be gone by then.
    held = GrpcStream(served.grpc_url, "nanoflow", text_input=prompts[0], stream=True, sampling_parameters=sampling)
    with ThreadPoolExecutor(20) as pool:
        jobs = [pool.submit(cancel_sse if n % 8 == 0 else cancel_grpc, n) for n in range(200)]
        until(lambda: metrics(served.metrics_url, "nanoflow")[USED_PAGES] > 0)
        for job in jobs:
            job.result()
    held.close(cancel=True)
    until(lambda: metrics(served.metrics_url, "nanoflow")[USED_PAGES] == 0)
    now = metrics(served.metrics_url, "nanoflow")
    assert (now["nanoflow_num_requests_running"], now["nanoflow_num_requests_waiting"]) == (0, 0)
    assert sum(pages for series, pages in now.items() if series.startswith("nanoflow_kv_cache_pages")) == 4096
