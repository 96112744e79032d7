"""The metrics page, its table in the documentation, and what dashboards and alerts ask it for."""

import re
import threading

import pytest
from support.places import ROOT
from support.telemetry.page import READY, load, stats

from nanoflow_backend.process.messages import Load
from nanoflow_backend.scheduler.observed import Observed
from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.telemetry.metrics import Metrics, Page


@pytest.fixture
def page(server, metrics):
    return Page(server.create, metrics)


def test_every_family_is_there_before_the_first_request(server, page):
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name, *_ in server.series}
    assert {family.name for family in FAMILIES} == shown
    assert server.value("nanoflow_kv_cache_pages", "tier=device", "state=free") == 10
    assert server.value("nanoflow_engine_up") == 1


def test_only_what_changed_is_written(server, metrics, page):
    metrics.carry(load(running=3))
    metrics.take(stats(preemptions=2))
    page.flush()
    before = server.calls
    page.flush()
    assert server.calls == before
    metrics.carry(load(running=4))
    metrics.take(stats(preemptions=2))
    page.flush()
    assert server.calls == before + 1
    assert server.value("nanoflow_num_requests_running") == 4
    assert server.value("nanoflow_num_preemptions_total") == 2


def test_the_load_is_newer_than_the_statistics(server, metrics, page):
    metrics.take(stats(running_requests=3, waiting_requests=2, used_pages=5))
    assert metrics.carry(load(running=4, used_pages=6))
    assert not metrics.carry(Load(running=4, waiting=0, used_pages=6, room=2, received=7)), "no gauge has changed"
    page.flush()
    assert server.value("nanoflow_num_requests_running") == 4
    assert server.value("nanoflow_num_requests_waiting") == 0
    assert server.value("nanoflow_kv_cache_usage_perc") == 0.6
    blocks = {"max": 10, "used": 6, "free": 4, "fraction": 0.6, "tokens_per": 4, "reused": 0}
    for kind, value in blocks.items():
        assert server.value("nv_trt_llm_kv_cache_block_metrics", f"kv_cache_block_type={kind}") == value
    metrics.engine_restarted(READY)
    page.flush()
    assert server.value("nanoflow_num_requests_running") == server.value("nanoflow_kv_cache_usage_perc") == 0


def test_the_age_of_the_statistics_is_that_of_the_engines_last_word(server):
    now_s = 100.0
    metrics = Metrics(READY, clock=lambda: now_s)
    page = Page(server.create, metrics)
    ages = []
    for passed_s, event in (
        (0.3, None),
        (4.0, lambda: metrics.take(stats(running_requests=3))),
        (0.2, None),
        (60.0, metrics.engine_died),
        (1.0, lambda: metrics.engine_restarted(READY)),
        (0.46, None),
        (9.0, metrics.confirm),
        (7.0, None),
    ):
        now_s += passed_s
        if event:
            event()
        page.flush()
        ages.append(server.value("nanoflow_stats_age_seconds"))
    assert ages == [0.3, 0.0, 0.2, 60.2, 0.0, 0.5, 0.0, 7.0]


def test_a_histogram_is_cumulative_as_prometheus_defines_it(server, metrics, page):
    observed = Observed()
    for value, times in ((0.0005, 3), (0.004, 2), (0.009, 5), (99.0, 1)):
        observed.inter_token_s.observe(value, times)
    metrics.take(stats(observed))
    page.flush()
    name = "nanoflow_inter_token_latency_seconds"
    made = {labels[0][3:]: value for (n, *labels), value in server.series.items() if n == f"{name}_bucket"}
    buckets = dict(sorted(made.items(), key=lambda bucket: float(bucket[0])))
    assert next(iter(made)) == "+Inf"
    assert list(buckets)[:6] == ["0.001", "0.0025", "0.005", "0.0075", "0.01", "0.015"]
    assert list(buckets.values())[:6] == [3, 3, 5, 5, 10, 10]
    assert list(buckets.items())[-2:] == [("10", 10), ("+Inf", 11)]
    assert server.value(f"{name}_count") == 11
    assert server.value(f"{name}_sum") == pytest.approx(0.0015 + 0.008 + 0.045 + 99)


def test_counts_go_on_when_the_engine_is_replaced(server, metrics, page):
    observed = Observed(delivered_tokens=100, ended={"stop": 5, "deadline": 2})
    observed.first_token_s.observe(0.2, 7)
    metrics.carry(load(running=3))
    metrics.take(stats(observed))
    page.flush()
    metrics.engine_died()
    page.flush()
    assert server.value("nanoflow_engine_up") == 0
    metrics.engine_restarted(READY)
    observed = Observed(delivered_tokens=130, ended={"stop": 6, "deadline": 1})
    observed.first_token_s.observe(0.002, 1)
    metrics.take(stats(observed))
    page.flush()
    assert server.value("nanoflow_engine_up") == server.value("nanoflow_engine_restarts_total") == 1
    assert server.value("nanoflow_generation_tokens_total") == 230
    assert server.value("nanoflow_request_success_total", "finished_reason=stop") == 11
    assert server.value("nanoflow_requests_refused_total", "reason=deadline") == 3
    assert server.value("nanoflow_num_requests_running") == 0
    assert server.value("nanoflow_time_to_first_token_seconds_bucket", "le=0.0025") == 1
    assert server.value("nanoflow_time_to_first_token_seconds_bucket", "le=+Inf") == 8


def test_refusals_of_any_reason_from_any_thread(server, metrics, page):
    def refuse():
        for _ in range(500):
            metrics.refused("queue_full")
            metrics.refused("a new one", 2)

    threads = [threading.Thread(target=refuse) for _ in range(4)]
    for thread in threads:
        thread.start()
    page.flush()
    for thread in threads:
        thread.join()
    page.flush()
    assert server.value("nanoflow_requests_refused_total", "reason=queue_full") == 2000
    assert server.value("nanoflow_requests_refused_total", "reason=a new one") == 4000
    assert server.value("nanoflow_requests_refused_total", "reason=invalid") == 0


def test_requests_that_the_engine_ends_for_a_reason_of_its_own_are_refusals(server, metrics, page):
    metrics.refused("deadline", 2)
    metrics.take(stats(Observed(ended={"stop": 8, "cancelled": 4, "deadline": 3, "evicted": 1})))
    page.flush()
    assert server.value("nanoflow_requests_refused_total", "reason=deadline") == 5
    assert server.value("nanoflow_requests_refused_total", "reason=evicted") == 1
    assert server.value("nanoflow_requests_cancelled_total") == 4


def test_names_follow_the_conventions_of_prometheus():
    for family in FAMILIES:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert (family.kind == "counter") == family.name.endswith("_total"), family.name
        assert not re.search(r"_(ms|us|millis|bytes_k)$", family.name)
        assert not re.match(r"[\d{]", family.meaning), "the server's ORCA header would take it for a value"
        if "time" in family.name or "latency" in family.name:
            assert family.name.endswith("_seconds")


def test_the_table_in_the_documentation_is_the_one_in_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    assert rows == [(f.name, f.kind, ", ".join(f"`{n}`" for n in f.labels), f.meaning) for f in FAMILIES]
