"""What a token costs, by a meter that the test turns."""

import time
from types import SimpleNamespace

import pytest

from nanoflow_backend.engine import energy
from nanoflow_backend.engine.energy import TokenEnergy, measure_energy
from nanoflow_backend.scheduler.observer import Observer


class Meter:
    def __init__(self, energy_j=1e6, tokens=500):
        self.energy_j, self.tokens, self.broken = energy_j, tokens, False

    def read(self):
        if self.broken:
            raise RuntimeError("not supported")
        return self


def engine(meter, kind="cuda"):
    return SimpleNamespace(
        executor=SimpleNamespace(device=SimpleNamespace(kind=kind)),
        scheduler=SimpleNamespace(observer=Observer(lambda: 0.0, 8)),
    )


def test_energy_since_the_last_look_is_shared_by_the_tokens_since_then():
    meter = Meter()
    share = TokenEnergy(lambda: meter.energy_j, lambda: meter.tokens)
    meter.energy_j, meter.tokens = 1e6 + 70, 500 + 1400
    assert share.of_a_token_j() == pytest.approx(0.05)
    meter.energy_j, meter.tokens = 1e6 + 90, 500 + 1500
    assert share.of_a_token_j() == pytest.approx(0.2)


def test_idle_time_costs_no_request():
    meter = Meter()
    share = TokenEnergy(lambda: meter.energy_j, lambda: meter.tokens)
    meter.energy_j += 1000
    assert share.of_a_token_j() is None
    meter.energy_j, meter.tokens = meter.energy_j + 5, meter.tokens + 10
    assert share.of_a_token_j() == pytest.approx(0.5)


def test_a_thread_tells_the_observer(monkeypatch):
    meter = Meter()
    served = engine(meter)
    monkeypatch.setattr(energy, "find_gpu_meter", lambda: meter)
    monkeypatch.setattr(energy, "PERIOD_S", 0.001)
    ticker = measure_energy(served)
    deadline_s = time.monotonic() + 30
    while not served.scheduler.observer.token_energy_j and time.monotonic() < deadline_s:
        meter.energy_j += 30
        served.scheduler.observer.observed.computed_tokens += 60
    ticker.stop(10)
    assert served.scheduler.observer.token_energy_j > 0


def test_where_nothing_measures_there_is_no_energy(monkeypatch):
    meter, warnings = Meter(), []
    monkeypatch.setattr(energy.log, "warning", lambda text, *values: warnings.append(text % values))
    monkeypatch.setattr(energy, "find_gpu_meter", lambda: None)
    assert measure_energy(engine(meter)) is None
    monkeypatch.setattr(energy, "find_gpu_meter", lambda: meter)
    assert measure_energy(engine(meter, kind="cpu")) is None
    assert not warnings
    meter.broken = True
    assert measure_energy(engine(meter)) is None
    assert warnings == ["requests have no energy: RuntimeError: not supported"]
