"""What an operator sees of a real server: its metrics page, its load headers, its traces; and what a client sees."""

import contextlib
import http.client
import json
import re
import time

import pytest
from support.engine.page_map import PageMap
from support.engine.subscriber import Subscriber
from support.server.clients import GrpcStream, generate, grpc, metrics, metrics_page, post
from support.telemetry import observability
from support.telemetry.collector import Collector
from support.telemetry.readers import READERS, orca
from support.waiting import until

from benchmarks.models import checkpoints, tiny_tokenizers
from benchmarks.server import add_model
from nanoflow_backend.serving.tensors import ACCOUNT_OUTPUTS
from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.text.tokenizer import Tokenizer

ACCOUNT_FLAGS = {f"return_{name}": True for name in ACCOUNT_OUTPUTS}
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14] * 4
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SERVICE = "nanoflow"


@pytest.fixture(scope="module")
def collector():
    collector = Collector()
    yield collector
    collector.http.shutdown()


@pytest.fixture(scope="module")
def kv_events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    return {"endpoint": f"ipc://{folder}/events", "replay_endpoint": f"ipc://{folder}/replay"}


@pytest.fixture(scope="module")
def served(server, collector, kv_events, tmp_path_factory):
    checkpoint = tiny_tokenizers.llama3(tmp_path_factory.mktemp("checkpoint"))
    vocab_size = Tokenizer.from_pretrained(checkpoint).vocab_size
    checkpoints.save(checkpoints.make("llama", vocab_size=vocab_size, max_position_embeddings=4096), checkpoint)
    repository = tmp_path_factory.mktemp("repository")
    settings = {
        "metrics_dialects": ["nanoflow", "vllm", "trtllm"],
        "otlp_traces_endpoint": collector.url,
        "kv_events": kv_events,
    }
    add_model(repository, checkpoint, max_running=2, max_queue_size=1, **settings)
    trace = ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={collector.url}"]
    arguments = [f"--trace-config={setting}" for setting in trace]
    return server(repository, log=tmp_path_factory.mktemp("log") / "server.log", arguments=arguments)


def shown(served):
    return metrics(served.metrics_url, "nanoflow")


INVALID = 'nanoflow_requests_refused_total{reason="invalid"}'


def change(served, before, *, until_finished, invalid=0):
    """What the metrics grew by, once so many requests more are counted as finished, and so many as invalid.

    The page is written series by series, and that of the refusals after all that the engine counts: one that shows
    the refusal of a request that came last of all is whole, however slowly it was written.
    """

    def finished(values):
        return sum(value for series, value in values.items() if series.startswith("nanoflow_request_success_total"))

    until(lambda: finished(shown(served)) == finished(before) + until_finished)
    assert post(served.http_url, "nanoflow", "generate", {"input_ids": PROMPT, "temperature": -1})[0] == 400
    until(lambda: shown(served)[INVALID] == before[INVALID] + invalid + 1)
    now = shown(served)
    now[INVALID] -= 1
    return {series: value - before.get(series, 0) for series, value in now.items()}


def test_every_metric_of_table_dashboard_and_alerts_is_on_the_page(served):
    page = metrics_page(served.metrics_url)
    series = set(re.findall(r"^(\w+){", page, re.MULTILINE))
    for family in FAMILIES:
        kind = "gauge" if family.kind == "gauge" else "counter"
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        for name in (family.name + suffix for suffix in suffixes):
            assert name in series
            assert f"# HELP {name} {family.meaning}\n# TYPE {name} {kind}\n" in page
    for title, expression in observability.expressions().items():
        assert observability.series_names(expression) <= series, title


def test_the_last_bucket_of_a_histogram_of_vllms_is_the_whole(served):
    """Scripts for Triton's vLLM backend take the last line of a name; with several models nobody can."""
    last = dict(re.findall(r'^(vllm:\w+_bucket){.*?le="(.+?)".*$', metrics_page(served.metrics_url), re.MULTILINE))
    assert len(last) >= 10
    assert set(last.values()) == {"+Inf"}


def test_requests_are_counted_exactly(served):
    before = shown(served)
    begun_s = time.monotonic()
    for max_tokens in (1, 2, 3, 4, 5, 6, 7, 8):
        sampling = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        assert generate(served.http_url, "nanoflow", input_ids=PROMPT, **sampling)
    took_s = time.monotonic() - begun_s
    grown = change(served, before, until_finished=8)
    assert grown['nanoflow_request_success_total{finished_reason="length"}'] == 8
    assert grown["nanoflow_generation_tokens_total"] == 36
    assert grown["nanoflow_prompt_tokens_total"] == 8 * 40
    hits = grown["nanoflow_prefix_cache_hits_total"]
    assert grown["nanoflow_computed_tokens_total"] == 8 * 40 - hits + 36 - 8  # the last of each is never an input
    assert hits >= 7 * 32  # pages of 16 tokens
    for name, count in (
        ("time_to_first_token_seconds", 8),
        ("e2e_request_latency_seconds", 8),
        ("request_queue_time_seconds", 8),
        ("request_prompt_tokens", 8),
        ("request_generation_tokens", 8),
        ("inter_token_latency_seconds", 36 - 8),
    ):
        assert grown[f"nanoflow_{name}_count"] == count, name
        assert grown[f'nanoflow_{name}_bucket{{le="+Inf"}}'] == count, name
    assert grown['nanoflow_request_generation_tokens_bucket{le="4"}'] == 4
    assert 0 < grown["nanoflow_time_to_first_token_seconds_sum"] < grown["nanoflow_e2e_request_latency_seconds_sum"]
    assert grown["nanoflow_e2e_request_latency_seconds_sum"] < took_s
    assert grown["nanoflow_step_time_seconds_count"] == grown["nanoflow_dense_batch_fill_ratio_count"] >= 36
    assert grown["nanoflow_step_time_seconds_sum"] < took_s


def test_ends_of_every_kind_are_counted_by_their_kind(served):
    before = shown(served)
    long = {"input_ids": PROMPT, "stream": True, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}
    assert post(served.http_url, "nanoflow", "generate", {"input_ids": PROMPT, "temperature": -1})[0] == 400
    assert post(served.http_url, "nanoflow", "generate", {"input_ids": PROMPT, "timeout": 1000, "max_tokens": 4000})[0]
    streams = [GrpcStream(served.grpc_url, "nanoflow", **long) for _ in range(2)]
    for stream in streams:
        next(iter(stream))
    streams.append(GrpcStream(served.grpc_url, "nanoflow", **long))
    until(lambda: shown(served)["nanoflow_num_requests_waiting"] == 1)
    assert shown(served)["nanoflow_num_requests_running"] == 2
    _, text = post(served.http_url, "nanoflow", "generate", {"input_ids": PROMPT})
    assert "are waiting, as many as max_queue_size allows" in text
    for stream in streams:
        stream.close(cancel=True)
    until(lambda: shown(served)["nanoflow_requests_cancelled_total"] == before["nanoflow_requests_cancelled_total"] + 3)
    stopped = generate(
        served.http_url, "nanoflow", text_input="the dog", stop=["a", "e", "i", "o", " "], max_tokens=400
    )
    assert stopped
    grown = change(served, before, until_finished=1, invalid=1)
    assert grown['nanoflow_request_success_total{finished_reason="stop"}'] == 1, "not cancelled: a stop string"
    refused = {"invalid": 1, "deadline": 1, "queue_full": 1, "unavailable": 0, "engine_failure": 0, "internal": 0}
    for reason, requests in refused.items():
        assert grown[f'nanoflow_requests_refused_total{{reason="{reason}"}}'] == requests, reason
    until(lambda: shown(served)["nanoflow_kv_cache_usage_perc"] == 0)


def test_load_headers_find_what_they_need(served):
    """The embedded server is too old to send them; one that does must send what its rule finds on the page."""
    assert orca(metrics_page(served.metrics_url)) == {"kv_cache_utilization": 0, "max_token_capacity": 65536}
    long = {"input_ids": PROMPT, "stream": True, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}
    with contextlib.closing(GrpcStream(served.grpc_url, "nanoflow", **long)) as stream:
        next(iter(stream))
        until(lambda: 0 < orca(metrics_page(served.metrics_url))["kv_cache_utilization"] < 0.1)
        stream.close(cancel=True)
    with contextlib.closing(http.client.HTTPConnection(served.http_url, timeout=60)) as connection:
        body, asks = json.dumps({"input_ids": PROMPT}), {"endpoint-load-metrics-format": "json"}
        connection.request("POST", "/v2/models/nanoflow/generate", body, asks)
        header = connection.getresponse().getheader("endpoint-load-metrics")
    if header is not None:
        assert json.loads(header.removeprefix("JSON "))["named_metrics"]["max_token_capacity"] == 65536


def test_gateways_and_autoscalers_see_the_load(served):
    """A model of two requests at a time has three. The page is written series by series: each is waited for."""
    long = {"input_ids": PROMPT, "stream": True, "sampling_parameters": '{"max_tokens": 4000, "ignore_eos": true}'}
    running, waiting = {"running": 2, "waiting": 0}, {"running": 2, "waiting": 1}
    config = {"block size": 16, "blocks": 4096}

    def says(reader, **expected):
        said = READERS[reader].read(metrics_page(served.metrics_url).replace('model_name="nanoflow"', 'model_name="m"'))
        return said | expected == said

    with contextlib.ExitStack() as streams:
        for number in range(3):
            stream = GrpcStream(served.grpc_url, "nanoflow", **long)
            streams.callback(stream.close, cancel=True)
            if number < 2:
                next(iter(stream))
            if number == 1:
                until(lambda: says("vLLM's router", **running))
        until(lambda: says("vLLM's router", **waiting))
        until(lambda: says("endpoint picker, engine `vllm`", **waiting, **config))
        until(lambda: says("endpoint picker, engine `triton-tensorrt-llm`", **waiting, **config))
        until(lambda: says("KServe", **{"vllm:num_requests_running": 2}))
        until(lambda: says("KEDA", **{"vllm:num_requests_waiting": 1}))
        until(lambda: says("vLLM's dashboard", **{"vllm:num_requests_running": 2}))
        until(lambda: not says("endpoint picker, engine `vllm`", **{"KV use": 0}))
    until(lambda: says("vLLM's router", running=0, waiting=0))


@pytest.mark.parametrize("stop", [[], ["a", "e", "i", "o", " "]])
def test_a_client_may_ask_what_its_request_took(served, stop):
    begun_s = time.monotonic()
    request = {"text_input": "the quick brown fox", "sampling_parameters": '{"max_tokens": 60, "ignore_eos": true}'}
    responses = grpc(
        served.grpc_url, "nanoflow", stream=True, **request, **ACCOUNT_FLAGS, **({"stop": stop} if stop else {})
    )
    took_s = time.monotonic() - begun_s
    assert all(ACCOUNT_OUTPUTS.isdisjoint(response) for response in responses[:-1])
    last = responses[-1]
    assert ACCOUNT_OUTPUTS - last.keys() == {"energy_j"}, "nothing measures it on a CPU"
    times = [last[f"{name}_time_s"] for name in ("queue", "prefill", "decode")]
    assert all(time_s > 0 for time_s in times)
    assert sum(times) == pytest.approx(last["total_time_s"], rel=1e-4)
    assert last["total_time_s"] < took_s
    assert last["peak_kv_pages"] >= 1


def test_a_gateway_hears_which_prompts_have_their_pages_here(served, kv_events):
    prompt = list(range(20, 60))
    with Subscriber(**kv_events) as gateway:
        heard = list(gateway.replay(0))
        assert PageMap().take(heard[0][2]) == ["AllBlocksCleared"]
        assert generate(served.http_url, "nanoflow", input_ids=prompt, max_tokens=9, temperature=0.0, ignore_eos=True)

        def blocks():
            known = PageMap()
            for _, _, payload in gateway.replay(0):
                known.take(payload)
            assert known.rank == 0
            return known.blocks["GPU"]

        until(lambda: (None, tuple(prompt[:16])) in blocks().values())
        (first,) = [block for block, held in blocks().items() if held == (None, tuple(prompt[:16]))]
        until(lambda: (first, tuple(prompt[16:32])) in blocks().values())


def spans_of(collector, trace_id):
    return [span for span in collector.spans if span[1] == trace_id]


def test_spans_join_the_servers_own_trace(served, collector):
    trace_id = TRACEPARENT.split("-")[1]
    with contextlib.closing(http.client.HTTPConnection(served.http_url, timeout=60)) as connection:
        body = json.dumps({"input_ids": PROMPT, "max_tokens": 5, "ignore_eos": True, "temperature": 0})
        connection.request("POST", "/v2/models/nanoflow/generate", body, {"traceparent": TRACEPARENT})
        assert connection.getresponse().status == 200
    until(lambda: len([s for s in spans_of(collector, trace_id) if s[0] == SERVICE]) == 4)
    until(lambda: any(s[0] != SERVICE for s in spans_of(collector, trace_id)))  # the server sends its own every 2 s
    ours = {span[4]: span for span in spans_of(collector, trace_id) if span[0] == SERVICE}
    servers = {span[2] for span in spans_of(collector, trace_id) if span[0] != SERVICE}
    assert ours.keys() == {"llm_request", "queue", "prefill", "decode"}
    _, _, span_id, parent_id, _, begin_ns, end_ns, attributes = ours["llm_request"]
    assert parent_id in servers
    assert attributes["gen_ai.usage.input_tokens"] == 40
    assert attributes["gen_ai.usage.output_tokens"] == 5
    assert attributes["gen_ai.response.finish_reason"] == "length"
    phases = [ours[name] for name in ("queue", "prefill", "decode")]
    assert {phase[3] for phase in phases} == {span_id}
    moments = [begin_ns, *(moment for phase in phases for moment in phase[5:7]), end_ns]
    assert moments == sorted(moments), "one after the other, inside the request"
    assert abs(end_ns / 1e9 - time.time()) < 120
