"""A checkpoint behind the real server: same tokens as the engine alone, clear errors, and nothing left behind."""

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tritonclient.grpc
from server.clients import GrpcStream, generate, generate_stream, grpc, metrics, post
from tritonclient.utils import InferenceServerException
from waiting import until

from benchmarks.models import checkpoints, tiny_tokenizers
from benchmarks.server import add_model
from nanoflow_backend.engine import LLM, SamplingParams
from nanoflow_backend.text.tokenizer import Tokenizer

pytestmark = pytest.mark.server

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "does", "not", "mind", "stop", "page"]
MINIMAL_CONFIG = 'backend: "python"\ninstance_group [ { kind: KIND_MODEL } ]\n'
GREEDY = {"temperature": 0.0, "max_tokens": 24}
USED_PAGES = 'nanoflow_kv_cache_pages{state="used",tier="device"}'
COUNTS = {"return_num_output_tokens": True, "return_total_output_tokens": True, "return_finish_reason": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Random weights, and a tokenizer of its vocabulary. It never ends by itself."""
    folder = tiny_tokenizers.llama3(tmp_path_factory.mktemp("checkpoint"))
    vocab_size = Tokenizer.from_pretrained(folder).vocab_size
    return checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size, max_position_embeddings=4096), folder)


@pytest.fixture(scope="module")
def served(server, checkpoint, tmp_path_factory):
    """A server without auto-completion; models are loaded by name."""
    repository = tmp_path_factory.mktemp("repository")
    ids_only = tmp_path_factory.mktemp("ids_only")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, ids_only)
    add_model(repository, checkpoint, name="nanoflow", schedule="nano-batched-3")
    add_model(repository, ids_only, name="narrow", max_running=1, max_queue_size=1)
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = ["--model-control-mode=explicit", "--load-model=nanoflow", "--load-model=narrow"]
    return server(repository, log=log, exit_timeout_s=30, arguments=[*arguments, "--disable-auto-complete-config"])


@pytest.fixture(scope="module")
def llm(checkpoint):
    return LLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(3)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(64)]


@pytest.fixture(scope="module")
def expected(llm, prompts):
    return llm.generate(prompts, SamplingParams(**GREEDY))


def loader(served):
    return contextlib.closing(tritonclient.grpc.InferenceServerClient(served.grpc_url))


def refused(message):
    return pytest.raises(InferenceServerException, match=message)


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


def test_a_request_of_a_vllm_client_works_unchanged(served, prompts, engine):
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


def test_a_model_without_tokenizer_continues_ids(served, engine):
    prompt = [5, 6, 7, 8]
    (completion,) = llm.generate([prompt], SamplingParams(**GREEDY))
    answer = generate(served.http_url, "narrow", input_ids=prompt, **GREEDY)
    assert (answer["output_ids"], "text_output" in answer) == (completion.token_ids, False)
    both = generate(served.http_url, "nanoflow", input_ids=prompt, **GREEDY)
    assert (both["output_ids"], both["text_output"]) == (completion.token_ids, completion.text)
    assert grpc(served.grpc_url, "nanoflow", input_ids=prompt, outputs=["num_input_tokens"]) == [
        {"num_input_tokens": 4}
    ]


A = {"text_input": "a"}
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
    "seed": ({**A, "seed": -1}, "seed: expected .* got -1"),
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
    with refused("1 requests are waiting, as many as max_queue_size allows"):
        grpc(served.grpc_url, "narrow", input_ids=[5])
    for stream in (running, waiting):
        stream.close(cancel=True)
    until(lambda: metrics(served.metrics_url, "narrow")["nanoflow_num_requests_running"] == 0)
    assert generate(served.http_url, "narrow", input_ids=[5], **GREEDY)


def test_a_crowd_is_refused_while_others_run_and_whoever_comes_again_is_served(served, engine):
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


def test_unloading_waits_for_streams_and_ends_the_engine(served, process_tree, checkpoint, prompts, expected):
    add_model(served.model_repository, checkpoint, name="passing")
    with loader(served) as client:
        before = process_tree(served.pid)
        client.load_model("passing")
        stream = GrpcStream(
            served.grpc_url, "passing", text_input=prompts[0], stream=True, sampling_parameters=json.dumps(GREEDY)
        )
        responses = iter(stream)
        text = next(responses)["text_output"]
        client.unload_model("passing")
        text += "".join(response["text_output"] for response in responses)
        assert text == expected[0].text
        stream.close()
        until(lambda: process_tree(served.pid).keys() <= before.keys())


def test_a_killed_engine_is_said_and_followed_by_another(served, process_tree, checkpoint, prompts):
    add_model(served.model_repository, checkpoint, name="doomed", max_engine_restarts=1)

    def engine_pid():
        """Of the model's engine, where there is one."""
        new = process_tree(served.pid).keys() - before.keys()
        return next((pid for pid in new if b"nanoflow_backend.engine.loop" in cmdline(pid)), None)

    with loader(served) as client:
        before = process_tree(served.pid)
        client.load_model("doomed")
        engine = engine_pid()
        long = {"stream": True, "sampling_parameters": json.dumps({"max_tokens": 4000})}
        streams = [GrpcStream(served.grpc_url, "doomed", text_input=prompt, **long) for prompt in prompts[:8]]
        waiting = threading.Thread(
            target=lambda: posted.append(post(served.http_url, "doomed", "generate", {**A, "max_tokens": 4000}))
        )
        posted = []
        waiting.start()
        for stream in streams:
            next(iter(stream))
        until(lambda: metrics(served.metrics_url, "doomed")["nanoflow_num_requests_running"] == 9)
        os.kill(engine, signal.SIGKILL)
        for stream in streams:
            with refused(f"the engine is gone: process {engine} ended with SIGKILL; restart 1 of 1 is under way"):
                list(stream)
            stream.close()
        waiting.join(60)
        assert posted[0][0] == 400
        assert "ended with SIGKILL" in posted[0][1]
        with refused("ended with SIGKILL; restart 1 of 1 is under way: try again later"):
            grpc(served.grpc_url, "doomed", **A)
        until(lambda: post(served.http_url, "doomed", "generate", A)[0] == 200)
        until(lambda: metrics(served.metrics_url, "doomed")["nanoflow_kv_cache_usage_perc"] == 0)
        os.kill(engine_pid(), signal.SIGKILL)
        until(lambda: "reload the model" in post(served.http_url, "doomed", "generate", A)[1])
        assert engine_pid() is None
        client.unload_model("doomed")
        until(lambda: process_tree(served.pid).keys() <= before.keys())
        client.load_model("doomed")
        assert generate(served.http_url, "doomed", **A)
        client.unload_model("doomed")
        until(lambda: process_tree(served.pid).keys() <= before.keys())


def cmdline(pid):
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def break_json(folder):
    (folder / "1" / "engine.json").write_text('{"model": ')


def misspell(folder):
    (folder / "1" / "engine.json").write_text('{"model": "x", "page_size": 16}')


def no_weights(folder):
    (folder / "empty").mkdir()
    shutil.copy(Path(json.loads((folder / "1" / "engine.json").read_text())["model"], "config.json"), folder / "empty")
    (folder / "1" / "engine.json").write_text('{"model": "../empty"}')


def too_large(folder):
    engine = json.loads((folder / "1" / "engine.json").read_text())
    (folder / "1" / "engine.json").write_text(json.dumps({**engine, "kv_cache_tokens": 10**12}))


def no_folder(folder):
    (folder / "1" / "engine.json").write_text('{"model": "../nowhere"}')


def bad_parameter(folder):
    config = (folder / "config.pbtxt").read_text()
    parameter = 'parameters { key: "page_tokens" value { string_value: "none" } }\n'
    (folder / "config.pbtxt").write_text(config + parameter)


def no_policy(folder):
    config = (folder / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config.replace("model_transaction_policy { decoupled: true }\n", ""))


BROKEN = {
    break_json: r"engine\.json: not valid JSON",
    misspell: r"engine\.json: .*unknown field `page_size`",
    no_weights: r"/empty: .*safetensors",
    too_large: r"kv_cache_tokens: 10+ tokens take .* GiB beside weights of .* GiB of memory are free on cpu: .* most",
    no_folder: r"/nowhere: there is no such folder",
    bad_parameter: r"engine\.json: Expected `int \| null`, got `str` - at `\$\.page_tokens`",
    no_policy: r"config\.pbtxt: expected model_transaction_policy \{ decoupled: true \}",
}


@pytest.mark.parametrize("break_", BROKEN, ids=lambda break_: break_.__name__)
def test_a_broken_folder_says_what_is_wrong(served, checkpoint, break_):
    name = f"broken_{break_.__name__}"
    break_(add_model(served.model_repository, checkpoint, name=name))
    with loader(served) as client, pytest.raises(InferenceServerException, match=BROKEN[break_]):
        client.load_model(name)
    assert re.search(BROKEN[break_], served.log.read_text())
    assert generate(served.http_url, "nanoflow", **A)


def test_a_five_line_folder_is_completed(server, checkpoint, tmp_path, prompts, expected):
    """Auto-completion fills in the tensors; fields of engine.json may stand in config.pbtxt; metrics may be off."""
    parameter = 'parameters { key: "page_tokens" value { string_value: "4" } }\n'
    add_model(tmp_path, checkpoint, name="minimal", config=MINIMAL_CONFIG + parameter)
    small = server(tmp_path, log=tmp_path / "log", exit_timeout_s=30, arguments=["--allow-metrics=false"])
    answer = generate(small.http_url, "minimal", text_input=prompts[0], exclude_input_in_output=True, **GREEDY)
    assert answer["text_output"] == expected[0].text
    assert "pages of 4 tokens" in small.log.read_text()
    small.stop()
