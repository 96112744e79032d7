"""Refinement: what loses is rejected, what wins is kept, drift changes nothing."""

import random

import pytest
from nanoflow_search.predict import Timing
from nanoflow_search.refine import STUDENT, refine
from scipy.stats import t as student

from nanoflow_backend.schedule.plan import Launch, Schedule


def plan(tokens: int) -> Schedule:
    return Schedule(tokens=tokens, launches=(Launch(operation="x", start=0, stop=tokens, lane="compute"),))


SEQUENTIAL, FASTER, FASTEST, SLOWER = plan(1), plan(2), plan(3), plan(4)
TRUE_US = {SEQUENTIAL.tokens: 1000.0, FASTER.tokens: 960.0, FASTEST.tokens: 930.0, SLOWER.tokens: 1010.0}


class NoisyDevice:
    """True times with seeded noise of 0.5 %, each run slower than the one before by `drift`."""

    def __init__(self, drift: float = 0.0, noise: float = 0.005, seed: int = 0) -> None:
        self.runs: list[int] = []
        self._drift, self._noise, self._random = drift, noise, random.Random(seed)

    def __call__(self, schedule: Schedule) -> Timing:
        slower = 1 + self._drift * len(self.runs)
        self.runs.append(schedule.tokens)
        layer_us = TRUE_US[schedule.tokens] * slower * self._random.lognormvariate(0, self._noise)
        return Timing(layer_us, 1500.0, 700.0, 700.0 * layer_us * 1e-6)


def test_the_fastest_that_wins_is_kept() -> None:
    device = NoisyDevice()
    found = refine(device, SEQUENTIAL, [(FASTER, 950.0), (SLOWER, 900.0), (FASTEST, 940.0)])
    assert found.chosen == FASTEST
    assert device.runs[:8] == [1, 2, 2, 1, 1, 2, 2, 1]
    assert [trial.schedule for trial in found.trials] == [FASTER, SLOWER, FASTEST]
    assert found.trials[0].error == pytest.approx(950 / 960 - 1, abs=0.01)
    assert found.trials[2].measured.layer_j < found.trials[2].sequential.layer_j
    gain = found.trials[2].over_sequential
    assert gain.low < 1000 / 930 < gain.high


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_that_loses_is_rejected(seed: int) -> None:
    """However good its prediction."""
    assert refine(NoisyDevice(seed=seed), SEQUENTIAL, [(SLOWER, 500.0)]).chosen == SEQUENTIAL


def test_an_uncertain_gain_is_no_gain() -> None:
    found = refine(NoisyDevice(noise=0.2), SEQUENTIAL, [(FASTER, 960.0)])
    assert found.trials[0].over_sequential.low < 1
    assert found.chosen == SEQUENTIAL


def test_a_steady_drift_changes_nothing() -> None:
    found = refine(NoisyDevice(drift=0.01, noise=0.0), SEQUENTIAL, [(FASTER, 960.0)])
    assert found.trials[0].over_sequential == pytest.approx((1000 / 960,) * 3)


def test_the_interval_is_students() -> None:
    assert [float(student.ppf(0.975, 1 + i)) for i in range(20)] == pytest.approx(STUDENT, abs=1e-4)


def test_an_interval_needs_rounds() -> None:
    with pytest.raises(ValueError, match=r"rounds: expected 2\.\.21, for an interval; got 1"):
        refine(NoisyDevice(), SEQUENTIAL, [], rounds=1)
    assert refine(NoisyDevice(), SEQUENTIAL, []).chosen == SEQUENTIAL
