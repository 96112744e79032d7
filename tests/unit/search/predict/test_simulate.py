"""The simulation of launches, against small steps of time."""

import random
from collections.abc import Sequence

import pytest
from nanoflow_search.predict.simulate import LaunchPhase, Pace, simulate_launches
from support.places import LLAMA_3_8B
from support.schedule.schedules import random_schedule

from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.plan import Launch, Schedule, ScheduleError, Wait

LAYER = build(read_model_config(LLAMA_3_8B)).layer
TIMES_US = {"gemm": 100.0, "read": 60.0}


def launch(operation: str, lane: str, *waits: Wait, start: int = 0, stop: int = 1, **fields: int) -> Launch:
    return Launch(operation=operation, start=start, stop=stop, lane=lane, waits=waits, **fields)


def alone(schedule: Schedule) -> list[list[LaunchPhase]]:
    return [[LaunchPhase(x.operation, 1.0, x.sms, TIMES_US[x.operation])] for x in schedule.launches]


def crowded(gemm: float, read: float, watts: float = 1.0):
    """A gemm and a read beside each other take so much longer."""

    def pace(running: tuple[LaunchPhase, ...]) -> Pace:
        slower = {"gemm": gemm, "read": read} if len(running) > 1 else {}
        return Pace(tuple(slower.get(phase.curve, 1.0) for phase in running), watts * len(running))

    return pace


def test_one_lane_is_the_sum() -> None:
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "a"), launch("read", "a")))
    found = simulate_launches(schedule, 5, alone(schedule), crowded(9, 9))
    assert found.total_us == pytest.approx(5 * 220)
    assert found.dynamic_j == pytest.approx(5 * 220e-6)
    assert found.done == pytest.approx((5, 5, 5))


def test_two_lanes_slow_each_other_down() -> None:
    """Apart they would take 100 and 60; side by side the read ends after 60 x 2, the gemm at 1 / 1.25 meanwhile."""
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "b")))
    found = simulate_launches(schedule, 1, alone(schedule), crowded(1.25, 2.0))
    assert found.total_us == pytest.approx(120 + (100 - 120 / 1.25))
    assert found.dynamic_j == pytest.approx((2 * 120 + 4) * 1e-6)
    free = simulate_launches(schedule, 10, alone(schedule), crowded(1, 1))
    assert free.total_us == pytest.approx(1000)  # the longer lane


def test_waits_are_kept() -> None:
    after = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "b", Wait(0))))
    assert simulate_launches(after, 1, alone(after), crowded(1, 1)).total_us == pytest.approx(160)
    # In a steady state the read of one layer is beside the gemm of the next.
    assert simulate_launches(after, 10, alone(after), crowded(1, 1)).total_us == pytest.approx(1060)
    both = Schedule(tokens=1, launches=(launch("gemm", "a", Wait(1, 1)), launch("read", "b", Wait(0))))
    assert simulate_launches(both, 10, alone(both), crowded(1, 1)).total_us == pytest.approx(1600)


def test_what_takes_no_time_passes_its_waits_on() -> None:
    launches = (launch("gemm", "a"), launch("idle", "b", Wait(0)), launch("read", "c", Wait(1)))
    schedule = Schedule(tokens=1, launches=launches)
    phases = [[LaunchPhase("gemm", 1.0, None, 100.0)], [], [LaunchPhase("read", 1.0, None, 60.0)]]
    assert simulate_launches(schedule, 1, phases, crowded(1, 1)).total_us == pytest.approx(160)


def test_launches_ahead_run_a_layer_early() -> None:
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "b", layers_ahead=1)))
    steps = schedule.unroll(3)
    assert steps[0] == (0, 1)
    assert simulate_launches(schedule, 3, alone(schedule), crowded(1, 1)).total_us == pytest.approx(300)


def test_a_circle_of_waits_is_refused() -> None:
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a", Wait(1)), launch("read", "b", Wait(0))))
    with pytest.raises(ScheduleError, match=r"launch 0 \(gemm 0\.\.1\) waits for what never ends"):
        simulate_launches(schedule, 1, alone(schedule), crowded(1, 1))


def stepped(schedule: Schedule, layers: int, times_us: Sequence[float], slower: float, step_us: float) -> float:
    """The same simulation in small steps of time, without events: at each, whoever may run advances."""
    steps = schedule.unroll(layers)
    left = [times_us[n] for _, n in steps]
    index = {step: k for k, step in enumerate(steps)}
    follows = [
        [index[layer - w.layers_back, w.launch] for w in schedule.launches[n].waits if w.layers_back <= layer]
        for layer, n in steps
    ]
    lanes = [[k for k, (_, n) in enumerate(steps) if schedule.launches[n].lane == lane] for lane in schedule.lanes]
    now_us = 0.0
    while any(us > 0 for us in left):
        heads = [next((k for k in lane if left[k] > 0), None) for lane in lanes]
        running = [k for k in heads if k is not None and all(left[w] <= 0 for w in follows[k])]
        for k in running:
            left[k] -= step_us / (1 + (slower - 1) * (len(running) - 1))
        now_us += step_us
    return now_us


@pytest.mark.parametrize("seed", range(12))
def test_random_plans_are_walked_as_in_small_steps(seed: int) -> None:
    rng = random.Random(seed)
    schedule = random_schedule(LAYER, 16, rng)
    times_us = [rng.uniform(1, 40) for _ in schedule.launches]
    slower = rng.uniform(1, 2)
    phases = [[LaunchPhase(str(n), 1.0, None, us)] for n, us in enumerate(times_us)]

    def pace(running: tuple[LaunchPhase, ...]) -> Pace:
        return Pace((1 + (slower - 1) * (len(running) - 1),) * len(running), 0.0)

    found = simulate_launches(schedule, 3, phases, pace)
    launches = 3 * len(schedule.launches)
    assert found.total_us == pytest.approx(stepped(schedule, 3, times_us, slower, 0.02), abs=0.02 * 2 * launches)
    assert found.done == pytest.approx([3.0] * len(schedule.launches))
