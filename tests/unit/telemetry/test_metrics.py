"""The metrics page, its table in the documentation, and what dashboards and alerts ask it for."""

import json
import re
import threading
from collections import Counter

import pytest
from support.places import ROOT

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.process.messages import Ready, Stats
from nanoflow_backend.scheduler.observed import Observed
from nanoflow_backend.scheduler.stats import SchedulerStats
from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.telemetry.metrics import Metrics, Page
from nanoflow_backend.telemetry.vllm_families import VLLM_FAMILIES, are_reported

READY = Ready(vocab_size=400, max_model_tokens=100, num_pages=10, page_tokens=4, description="fake", queue_room=9)


class Server:
    """The server's page: refuses what the real one refuses, and counts the calls."""

    def __init__(self):
        self.series, self.kinds, self.calls = {}, {}, 0

    def create(self, kind, name, meaning, labels):
        assert self.kinds.setdefault(name, kind) == kind
        key = (name, *(f"{label}={value}" for label, value in labels.items()))
        assert key not in self.series, f"{key} is made twice"
        self.series[key] = 0.0
        return _Metric(self, kind, key)

    def value(self, name, *labels):
        return self.series[name, *labels]


class _Metric:
    def __init__(self, server, kind, key):
        self.server, self.kind, self.key = server, kind, key

    def set(self, value):
        assert self.kind == "gauge", "the server raises here"
        self.server.calls += 1
        self.server.series[self.key] = value

    def increment(self, value):
        assert self.kind == "gauge" or value >= 0, "the server raises here"
        self.server.calls += 1
        self.server.series[self.key] += value


def stats(observed=None, **scheduler):
    fields = {**dict.fromkeys(SchedulerStats.__struct_fields__, 0), "num_pages": 10, **scheduler}
    return Stats(SchedulerStats(**fields), observed or Observed())


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def metrics():
    return Metrics(READY)


@pytest.fixture
def page(server, metrics):
    return Page(server.create, metrics)


def test_every_family_is_there_before_the_first_request(server, page):
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name, *_ in server.series}
    assert {family.name for family in FAMILIES} == shown
    assert server.value("nanoflow_kv_cache_pages", "tier=device", "state=free") == 10
    assert server.value("nanoflow_engine_up") == 1


def test_only_what_changed_is_written(server, metrics, page):
    metrics.take(stats(running_requests=3, preemptions=2))
    page.flush()
    before = server.calls
    page.flush()
    assert server.calls == before
    metrics.take(stats(running_requests=4, preemptions=2))
    page.flush()
    assert server.calls == before + 1
    assert server.value("nanoflow_num_requests_running") == 4
    assert server.value("nanoflow_num_preemptions_total") == 2


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
    metrics.take(stats(observed, running_requests=3))
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


def test_vllms_names_have_the_same_values(server, metrics):
    observed = Observed(delivered_tokens=40)
    for value, times in ((0.004, 3), (0.02, 7), (0.3, 1), (200.0, 2)):
        observed.first_token_s.observe(value, times)
        observed.inter_token_s.observe(value, times)
    page = Page(server.create, metrics, VLLM_FAMILIES)
    metrics.take(stats(observed, prefix_query_tokens=9))
    for n in (1, 1, 3, 21):
        metrics.queued(n)
    page.flush()
    assert server.value("vllm:prompt_tokens_total") == 9
    assert server.value("vllm:generation_tokens_total") == 40
    first = {le: server.value("vllm:time_to_first_token_seconds_bucket", f"le={le}") for le in ("0.01", "10", "+Inf")}
    assert first == {"0.01": 3, "10": 11, "+Inf": 13}
    assert server.value("vllm:time_per_output_token_seconds_bucket", "le=0.02") == 10
    assert server.value("vllm:time_per_output_token_seconds_count") == 13
    assert server.value("vllm:request_params_n_bucket", "le=2") == 2
    assert server.value("vllm:request_params_n_bucket", "le=5") == 3
    assert (server.value("vllm:request_params_n_count"), server.value("vllm:request_params_n_sum")) == (4, 26)
    metrics.engine_restarted(READY)
    metrics.queued(1)
    metrics.take(stats(Observed(delivered_tokens=2)))
    page.flush()
    assert server.value("vllm:generation_tokens_total") == 42
    assert server.value("vllm:request_params_n_count") == 5


def test_the_buckets_of_vllms_names_are_few_and_exist(server, metrics):
    """Of more than 13 series of a name the server does not list the first one last."""
    Page(server.create, metrics, VLLM_FAMILIES)
    made = Counter(name for name, *_ in server.series)
    assert max(made.values()) <= 13
    for family in VLLM_FAMILIES:
        assert family.bounds is None or set(family.bounds) <= set(family.read(metrics.view()).bounds), family.name


@pytest.mark.parametrize(
    ("said", "model_json", "reported"),
    [
        (None, {}, False),
        ("false", {}, False),
        ("No", {}, False),
        ("true", {}, True),
        ("True", {"disable_log_stats": False}, True),
        ("yes", None, True),
        ("true", {"disable_log_stats": True}, False),
        ("true", {"disable_log_stats": "true"}, False),
    ],
)
def test_vllms_names_are_shown_where_they_are_asked_for(tmp_path, said, model_json, reported):
    file = "engine.json" if model_json is None else "model.json"
    (tmp_path / file).write_text(json.dumps({"model": "m", **(model_json or {})}))
    config = {"parameters": {} if said is None else {"REPORT_CUSTOM_METRICS": {"string_value": said}}}
    assert are_reported(config, tmp_path) is reported


def test_a_switch_that_is_neither_on_nor_off_is_named(tmp_path):
    (tmp_path / "engine.json").write_text("{}")
    config = {"parameters": {"REPORT_CUSTOM_METRICS": {"string_value": "1"}}}
    with pytest.raises(ConfigError, match="REPORT_CUSTOM_METRICS: expected true or false, got '1'"):
        are_reported(config, tmp_path)


def test_the_documentation_says_which_is_which():
    rows = re.findall(r"^\| `(vllm:\w+)` \| (\S+)", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    ours = {id(family.read): f"`{family.name}`" for family in FAMILIES}
    assert rows == [(family.name, ours.get(id(family.read), "none:")) for family in VLLM_FAMILIES]


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
