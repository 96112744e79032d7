"""Spans of requests, from accounts; kept by an exporter in this process."""

import sys
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.scheduler.account import Account
from nanoflow_backend.telemetry.tracing import Tracer

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXT = f'{{"traceparent":"00-{TRACE_ID}-{PARENT_ID}-01"}}'


@pytest.fixture
def exporter():
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter):
    tracer = Tracer("http://nowhere/v1/traces", "tiny", exporter)
    yield tracer
    tracer.close()


def spans(tracer, exporter):
    tracer._provider.force_flush()
    return {span.name: span for span in exporter.get_finished_spans()}


def test_the_phases_of_a_request_are_spans_inside_its_own(tracer, exporter):
    now_s, now_ns = time.monotonic(), time.time_ns()
    trace = tracer.request(CONTEXT, now_s - 5.0)
    trace.end("stop", 7, 9, Account(now_s - 5, now_s - 4, now_s - 2, now_s - 1, peak_pages=3, energy_j=1.5))
    made = spans(tracer, exporter)
    assert made.keys() == {"llm_request", "queue", "prefill", "decode"}
    assert {f"{span.context.trace_id:032x}" for span in made.values()} == {TRACE_ID}
    whole = made["llm_request"]
    assert f"{whole.parent.span_id:016x}" == PARENT_ID
    assert dict(whole.attributes) == {
        "gen_ai.usage.input_tokens": 7,
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.response.finish_reason": "stop",
        "nanoflow.peak_kv_pages": 3,
        "nanoflow.energy_j": 1.5,
    }
    for name, begin_s, end_s in (("queue", -5, -4), ("prefill", -4, -2), ("decode", -2, -1), ("llm_request", -5, 0)):
        assert made[name].start_time == pytest.approx(now_ns + begin_s * 1e9, abs=5e8)
        assert made[name].end_time == pytest.approx(now_ns + end_s * 1e9, abs=5e8)
        assert name == "llm_request" or made[name].parent.span_id == whole.context.span_id


def test_a_request_that_never_ran_has_the_phases_that_it_had(tracer, exporter):
    now_s = time.monotonic()
    tracer.request(CONTEXT, now_s).end("UNAVAILABLE", 7, 0, Account(now_s, None, None, now_s, 0, None))
    assert spans(tracer, exporter).keys() == {"llm_request", "queue"}
    exporter.clear()
    tracer.request(CONTEXT, now_s).end("INVALID_ARG", 7, 0, None)
    assert spans(tracer, exporter).keys() == {"llm_request"}


@pytest.mark.parametrize("context", [None, ""])
def test_what_the_server_does_not_trace_has_no_spans(tracer, context):
    assert tracer.request(context, 0.0) is None


def test_a_request_that_the_server_did_not_sample_has_no_spans(tracer, exporter):
    tracer.request(CONTEXT.replace("-01", "-00"), 0.0).end("stop", 1, 1, None)
    assert not spans(tracer, exporter)


def test_without_its_packages_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"otlp_traces_endpoint: .*nanoflow-triton\[tracing\]"):
        Tracer("http://nowhere/v1/traces", "tiny")
