"""Refinement: what loses is rejected, what wins is kept, drift changes nothing, what was timed is not timed again."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from nanoflow_search.checkpoint import Checkpoint, Run
from nanoflow_search.emit.statistics import STUDENT
from nanoflow_search.emit.trials import run_trials
from nanoflow_search.predict.predict import Timer, Timing
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


def one(timer: Timer) -> dict[str, Timer]:
    return {"1024/512": timer}


def test_the_fastest_that_wins_is_kept() -> None:
    device = NoisyDevice()
    found = run_trials(one(device), SEQUENTIAL, [FASTER, SLOWER, FASTEST])
    assert found.chosen == 2
    assert device.runs[:8] == [1, 2, 2, 1, 1, 2, 2, 1]
    trial = found.trials[2].by_workload["1024/512"]
    assert trial.timing.layer_us == pytest.approx(930, rel=0.01)
    assert trial.sequential.layer_us == pytest.approx(1000, rel=0.01)
    assert trial.timing.layer_j < trial.sequential.layer_j
    assert trial.gain.low < 1000 / 930 < trial.gain.high
    assert trial.gain == pytest.approx(found.trials[2].gain)


@pytest.mark.parametrize("seed", range(20))
def test_a_plan_that_loses_is_rejected(seed: int) -> None:
    assert run_trials(one(NoisyDevice(seed=seed)), SEQUENTIAL, [SLOWER]).chosen is None


def test_an_uncertain_gain_is_no_gain() -> None:
    found = run_trials(one(NoisyDevice(noise=0.2)), SEQUENTIAL, [FASTER])
    assert found.trials[0].gain.low < 1
    assert found.chosen is None


def test_a_steady_drift_changes_nothing() -> None:
    found = run_trials(one(NoisyDevice(drift=0.01, noise=0.0)), SEQUENTIAL, [FASTER])
    assert found.trials[0].gain == pytest.approx((1000 / 960,) * 3)


def biased(device: NoisyDevice, **factors: float) -> Timer:
    def timer(schedule: Schedule) -> Timing:
        timing = device(schedule)
        return timing._replace(layer_us=timing.layer_us * factors.get(f"plan_{schedule.tokens}", 1.0))

    return timer


def test_what_loses_on_one_workload_is_rejected_however_much_it_wins_on_another() -> None:
    timers = {"512/512": biased(NoisyDevice(), plan_3=0.8), "1024/512": biased(NoisyDevice(), plan_3=1.15)}
    found = run_trials(timers, SEQUENTIAL, [FASTER, FASTEST])
    assert found.trials[1].gain.mean > found.trials[0].gain.mean
    assert found.trials[1].gain.low > 1
    assert found.chosen == 0
    assert set(found.trials[0].by_workload) == set(timers)


def test_what_was_timed_is_not_timed_again(tmp_path: Path) -> None:
    def counted(cut_after: int) -> tuple[NoisyDevice, Callable[[Schedule], Timing]]:
        device = NoisyDevice(noise=0.0)

        def timer(schedule: Schedule) -> Timing:
            if len(device.runs) == cut_after:
                raise KeyboardInterrupt
            return device(schedule)

        return device, timer

    _, timer = counted(cut_after=14)  # in the middle of the fourth round
    with pytest.raises(KeyboardInterrupt):
        run_trials(one(timer), SEQUENTIAL, [FASTER, FASTEST], run=Run(Checkpoint(tmp_path)))
    second, timer = counted(cut_after=1000)
    found = run_trials(one(timer), SEQUENTIAL, [FASTER, FASTEST], run=Run(Checkpoint(tmp_path)))
    assert len(second.runs) == 40 - 12
    assert found == run_trials(one(NoisyDevice(noise=0.0)), SEQUENTIAL, [FASTER, FASTEST])


def test_the_interval_is_students() -> None:
    assert [float(student.ppf(0.975, 1 + i)) for i in range(20)] == pytest.approx(STUDENT, abs=1e-4)


def test_an_interval_needs_rounds() -> None:
    with pytest.raises(ValueError, match=r"rounds: expected 2\.\.21, for an interval; got 1"):
        run_trials(one(NoisyDevice()), SEQUENTIAL, [], rounds=1)
    assert run_trials(one(NoisyDevice()), SEQUENTIAL, []).chosen is None
