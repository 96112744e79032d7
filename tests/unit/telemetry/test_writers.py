"""When a model's metrics are written: what is live when the load has changed, the others when statistics came."""

import threading
import time

import pytest
from support.telemetry.page import LABELS, READY, load, stats
from support.waiting import until

from nanoflow_backend.telemetry import writers as module
from nanoflow_backend.telemetry.families import FAMILIES
from nanoflow_backend.telemetry.metrics import Metrics
from nanoflow_backend.telemetry.vllm_families import VLLM_FAMILIES
from nanoflow_backend.telemetry.writers import LIVE_PERIOD_S, Writers


class MetricFamily:
    """The server's, which raises where a name is made twice."""

    GAUGE, COUNTER = "gauge", "counter"
    made, written, lock = {}, [], threading.Lock()

    def __init__(self, name, description, kind):
        assert name not in self.made
        self.name, self.labels = name, []
        self.made[name] = self

    def Metric(self, labels):
        self.labels.append(labels)
        return self

    def set(self, value):
        with self.lock:
            self.written.append((self.name, value))

    increment = set


@pytest.fixture
def written(monkeypatch):
    """(name, value) of what is written from now on; only when something is told."""
    monkeypatch.setattr(module, "FLUSH_PERIOD_S", 60.0)
    monkeypatch.setattr(MetricFamily, "made", {})
    monkeypatch.setattr(MetricFamily, "written", [])
    return MetricFamily.written


@pytest.fixture
def metrics():
    return Metrics(READY)


@pytest.fixture
def writers(written, metrics):
    made = Writers(MetricFamily, LABELS, metrics, [*FAMILIES, *VLLM_FAMILIES])
    written.clear()
    yield made
    made.stop(10)


def test_a_load_is_written_without_the_statistics_and_they_without_it(written, metrics, writers):
    metrics.take(stats(preemptions=2))
    assert metrics.carry(load(running=3))
    writers.load_changed()
    until(lambda: len(written) == 2)
    assert written == [("nanoflow_num_requests_running", 3), ("vllm:num_requests_running", 3)]
    writers.statistics_came()
    until(lambda: len(written) == 4)
    assert written[2:] == [("nanoflow_num_preemptions_total", 2), ("vllm:num_preemptions_total", 2)]


def test_of_many_loads_few_are_written_and_the_last_one_is(written, metrics, writers):
    begun_s = time.monotonic()
    for waiting in range(1, 1001):
        metrics.carry(load(waiting=waiting))
        writers.load_changed()
        time.sleep(0.0002)
    until(lambda: written[-1] == ("vllm:num_requests_waiting", 1000))
    assert 2 <= len(written) / 2 <= (time.monotonic() - begun_s) / LIVE_PERIOD_S + 2


def test_series_say_which_engine_they_are_of(written, metrics, writers):
    assert MetricFamily.made["nanoflow_num_requests_running"].labels == [
        {"model": "m", "version": "1", "engine": "m_0_0"}
    ]
    of_model = {"model": "m", "version": "1", "model_name": "m"}
    assert MetricFamily.made["vllm:num_requests_running"].labels == [{**of_model, "engine": "m_0_0"}]
    assert MetricFamily.made["vllm:generation_tokens_total"].labels == [of_model]
    config = {"engine": "m_0_0", "block_size": "4", "num_gpu_blocks": "10"}
    assert MetricFamily.made["vllm:cache_config_info"].labels == [{**of_model, **config}]
