"""Steps of a warm engine, with a GPU's meter and profiler that are made up."""

from itertools import count
from types import SimpleNamespace

import pytest

from nanoflow_backend.bench import warm_steps
from nanoflow_backend.bench.offline_run import queue_all
from nanoflow_backend.bench.workload import constant
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.engine import Engine


class Meter:
    """Ten joules a reading, one second apart."""

    def __init__(self):
        self._readings = count()

    def read(self):
        number = next(self._readings)
        return SimpleNamespace(time_s=float(number), energy_j=10.0 * number, sm_clock_mhz=1500)


@pytest.fixture
def profiled(monkeypatch):
    """The engines that were profiled, with the steps each had made."""
    engines = []
    monkeypatch.setattr(warm_steps, "break_down", lambda engine, step: engines.append(engine) or {"profiled_steps": 10})
    return engines


def engine_with(requests, output_tokens):
    engine = Engine.from_pretrained("demo/tiny-llama", kv_cache_tokens=4096, max_running=4)
    queue_all(engine, constant(8, output_tokens, requests))
    return engine


def test_steps_are_measured_once_no_request_waits(profiled):
    engine = engine_with(requests=6, output_tokens=60)
    found = warm_steps.measure_warm_steps(engine, Meter())
    assert profiled == [engine]
    assert found["profiled_steps"] == 10
    assert 0 < found["running_requests"] <= 4
    undisturbed = found["undisturbed"]
    assert undisturbed["step_ms"] == 1e3 / warm_steps.UNDISTURBED_STEPS
    assert undisturbed["power_w"] == 10.0
    # Two to four requests decode in each of the steps, in a second by the meter.
    steps = warm_steps.UNDISTURBED_STEPS
    assert 2 * steps <= undisturbed["total_tokens_per_s"] <= 4 * steps + 16


def test_a_workload_that_ends_before_the_profile_is_named(profiled):
    with pytest.raises(ConfigError, match="--breakdown-only: the requests ended before the profile"):
        warm_steps.measure_warm_steps(engine_with(requests=2, output_tokens=4), Meter())
    assert profiled == []
