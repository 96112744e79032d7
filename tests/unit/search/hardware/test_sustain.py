"""Sustained runs, on a GPU in simulated time."""

import pytest
from nanoflow_search.hardware.sustain import sustain
from support.simulated.gpu import IDLE_W, SimulatedGpu, SimulatedWork


def test_back_to_back_leaves_no_gap() -> None:
    gpu = SimulatedGpu()
    used = sustain([SimulatedWork(gpu, 1e-3, 400.0)], gpu, 1.0, sleep=gpu.sleep)
    assert used.call_s == pytest.approx((1e-3,))
    assert used.power_w == pytest.approx(IDLE_W + 400)
    assert (used.busy, used.sm_clock_mhz) == (1.0, 1580)
    assert gpu.idle_s == 0
    assert 1.7 < gpu.now_s < 2.0


def test_side_by_side_each_is_timed_for_itself() -> None:
    """Bursts of different lengths: neither waits for the other."""
    gpu = SimulatedGpu(crowd=1.5)
    works = [SimulatedWork(gpu, 1e-3, 300.0), SimulatedWork(gpu, 7e-4, 200.0, calls=60)]
    used = sustain(works, gpu, 1.0, sleep=gpu.sleep)
    assert used.call_s == pytest.approx((1.5e-3, 1.05e-3), rel=0.01)
    assert used.power_w == pytest.approx(IDLE_W + 500, rel=0.01)


@pytest.mark.parametrize("busy", [0.3, 0.5, 0.9])
def test_pauses_leave_the_device_idle(busy: float) -> None:
    gpu = SimulatedGpu()
    used = sustain([SimulatedWork(gpu, 1e-3, 800.0)], gpu, 1.0, busy=busy, sleep=gpu.sleep)
    assert used.call_s == pytest.approx((1e-3,))
    assert used.busy == pytest.approx(busy, abs=0.05)
    assert used.power_w == pytest.approx(IDLE_W + 800 * used.busy, rel=0.02)
    assert used.sm_clock_mhz == 1180  # read while it works


def test_heat_takes_turns() -> None:
    gpu = SimulatedGpu()
    work, heater = SimulatedWork(gpu, 1e-3, 200.0), SimulatedWork(gpu, 2e-3, 600.0)
    used = sustain([work], gpu, 1.0, rest=heater, sleep=gpu.sleep)
    assert gpu.idle_s == 0
    assert used.call_s == pytest.approx((1e-3,))
    assert used.busy == pytest.approx(1 / 3, abs=0.03)
    assert used.power_w == pytest.approx(IDLE_W + 600 - 400 * used.busy, rel=0.05)


def test_a_burst_longer_than_the_window_counts() -> None:
    gpu = SimulatedGpu()
    used = sustain([SimulatedWork(gpu, 0.05, 100.0)], gpu, 0.5, sleep=gpu.sleep)
    assert used.call_s == pytest.approx((0.05,))
