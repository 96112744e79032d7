"""Predictions of whole schedules: against closed forms, against a device that times plans by its own law, and work is
neither lost nor done twice."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
from msgspec.structs import replace as change
from nanoflow_search.cost.work import Mix
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import predict, walk_at
from nanoflow_search.predict.simulate import Pace, Phase, walk
from nanoflow_search.predict.timing_model import Measured
from nanoflow_search.profile.data import Header, Load, Pair, Point, Profile, ProfileError
from nanoflow_search.profile.points import loads_of
from profiled import capped, profiled
from schedules import plans, random_schedule

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.plan import Launch, Schedule, ScheduleError, Wait
from nanoflow_backend.schedule.presets import nano_batched, sequential, synchronise

MODELS = Path(__file__).parents[4] / "benchmarks" / "models"
LAYER = build(read_model_config(MODELS / "llama-3-8b")).layer
MIX = Mix(1365, 683, 1024, 256)
TIMES_US = {"gemm": 100.0, "read": 60.0}


def launch(operation: str, lane: str, *waits: Wait, start: int = 0, stop: int = 1, **fields: int) -> Launch:
    return Launch(operation=operation, start=start, stop=stop, lane=lane, waits=waits, **fields)


def alone(schedule: Schedule) -> list[list[Phase]]:
    return [[Phase(x.operation, 1.0, x.sms, TIMES_US[x.operation])] for x in schedule.launches]


def crowded(gemm: float, read: float, watts: float = 1.0):
    """A gemm and a read beside each other take so much longer."""

    def pace(running: tuple[Phase, ...]) -> Pace:
        slower = {"gemm": gemm, "read": read} if len(running) > 1 else {}
        return Pace(tuple(slower.get(phase.curve, 1.0) for phase in running), watts * len(running))

    return pace


# the walk


def test_one_lane_is_the_sum() -> None:
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "a"), launch("read", "a")))
    found = walk(schedule, 5, alone(schedule), crowded(9, 9))
    assert found.total_us == pytest.approx(5 * 220)
    assert found.dynamic_j == pytest.approx(5 * 220e-6)
    assert found.done == pytest.approx((5, 5, 5))


def test_two_lanes_slow_each_other_down() -> None:
    """Apart they would take 100 and 60; side by side the read ends after 60 x 2, the gemm at 1 / 1.25 meanwhile."""
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "b")))
    found = walk(schedule, 1, alone(schedule), crowded(1.25, 2.0))
    assert found.total_us == pytest.approx(120 + (100 - 120 / 1.25))
    assert found.dynamic_j == pytest.approx((2 * 120 + 4) * 1e-6)
    free = walk(schedule, 10, alone(schedule), crowded(1, 1))
    assert free.total_us == pytest.approx(1000)  # the longer lane


def test_waits_are_kept() -> None:
    after = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "b", Wait(0))))
    assert walk(after, 1, alone(after), crowded(1, 1)).total_us == pytest.approx(160)
    # In a steady state the read of one layer is beside the gemm of the next.
    assert walk(after, 10, alone(after), crowded(1, 1)).total_us == pytest.approx(1060)
    both = Schedule(tokens=1, launches=(launch("gemm", "a", Wait(1, 1)), launch("read", "b", Wait(0))))
    assert walk(both, 10, alone(both), crowded(1, 1)).total_us == pytest.approx(1600)


def test_what_takes_no_time_passes_its_waits_on() -> None:
    launches = (launch("gemm", "a"), launch("idle", "b", Wait(0)), launch("read", "c", Wait(1)))
    schedule = Schedule(tokens=1, launches=launches)
    phases = [[Phase("gemm", 1.0, None, 100.0)], [], [Phase("read", 1.0, None, 60.0)]]
    assert walk(schedule, 1, phases, crowded(1, 1)).total_us == pytest.approx(160)


def test_launches_ahead_run_a_layer_early() -> None:
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a"), launch("read", "b", layers_ahead=1)))
    steps = schedule.unroll(3)
    assert steps[0] == (0, 1)
    assert walk(schedule, 3, alone(schedule), crowded(1, 1)).total_us == pytest.approx(300)


def test_a_circle_of_waits_is_refused() -> None:
    schedule = Schedule(tokens=1, launches=(launch("gemm", "a", Wait(1)), launch("read", "b", Wait(0))))
    with pytest.raises(ScheduleError, match=r"launch 0 \(gemm 0\.\.1\) waits for what never ends"):
        walk(schedule, 1, alone(schedule), crowded(1, 1))


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
    phases = [[Phase(str(n), 1.0, None, us)] for n, us in enumerate(times_us)]

    def pace(running: tuple[Phase, ...]) -> Pace:
        return Pace((1 + (slower - 1) * (len(running) - 1),) * len(running), 0.0)

    found = walk(schedule, 3, phases, pace)
    launches = 3 * len(schedule.launches)
    assert found.total_us == pytest.approx(stepped(schedule, 3, times_us, slower, 0.02), abs=0.02 * 2 * launches)
    assert found.done == pytest.approx([3.0] * len(schedule.launches))


# predictions


def header(**fields: float) -> Header:
    shape = {"static_w": 200.0, "power_cap_w": 700.0} | fields
    return Header(model_fingerprint="f", precision=BFLOAT16, device="d", device_sms=100, tensor_parallel=1, **shape)


def points(graph: Graph, us: float, watts: float, *, cycles: bool) -> list[Point]:
    """Every operation takes `us` a token at 2000 MHz; with `cycles` twice that at 1000 MHz, for half of the energy."""
    found = []
    for op in graph.operations:
        for clock in (1000.0, 2000.0):
            slower = 2000 / clock if cycles else 1.0
            joules = watts * us * 1e-6 / slower
            found.append(Point(operation=op.name, amount=1.0, sms=100, duration_us=us * slower, dynamic_j=joules,
                               clock_mhz=clock))  # fmt: skip
    return found


def test_sequential_is_the_sum_at_the_clock_that_power_leaves() -> None:
    count = len(LAYER.operations)
    schedule = sequential(LAYER, 8)
    cool = Profile(header=header(), points=tuple(points(LAYER, 2.0, 400.0, cycles=True)))
    found = predict(schedule, Measured(cool, Mix(0, 8, 0, 1)), 4)
    assert found.layer_us == pytest.approx(16 * count)
    assert (found.clock_mhz, found.power_w) == pytest.approx((2000, 600))
    # P(f) = 200 + 1000 (f / 2000)^2 = 700: time goes with 1 / f, energy with f.
    hot = Profile(header=header(), points=tuple(points(LAYER, 2.0, 1000.0, cycles=True)))
    found = predict(schedule, Measured(hot, Mix(0, 8, 0, 1)), 4)
    assert found.clock_mhz == pytest.approx(2000 * 0.5**0.5, abs=3)
    assert found.layer_us == pytest.approx(16 * count / 0.5**0.5, rel=0.002)
    assert found.power_w == pytest.approx(700, rel=0.005)
    assert found.layer_j == pytest.approx(found.power_w * found.layer_us * 1e-6)


def test_pairs_slow_down_and_change_the_energy() -> None:
    schedule = Schedule(tokens=8, launches=tuple(
        Launch(operation=op.name, start=0, stop=8, lane="b" if op.name == "attention" else "a", sms=None)
        for op in LAYER.operations
    ))  # fmt: skip
    schedule = synchronise(schedule, LAYER)
    profile = Profile(header=header(), points=tuple(points(LAYER, 2.0, 100.0, cycles=True)))
    measured = Measured(profile, Mix(0, 8, 0, 1))
    assert measured.slowdown(("o", None), ("attention", None)) == 2  # never measured: in turns
    pair = Pair(first="o", first_sms=None, second="attention", second_sms=30, first_slowdown=1.2,
                second_slowdown=1.6, power_w=0.0, clock_mhz=0.0, energy_ratio=1.1)  # fmt: skip
    far = change(pair, second_sms=80, first_slowdown=1.4, energy_ratio=1.3)
    measured = Measured(change(profile, pairs=(pair, far)), Mix(0, 8, 0, 1))
    assert measured.slowdown(("o", None), ("attention", 40)) == 1.2
    assert measured.slowdown(("attention", 40), ("o", None)) == 1.6
    assert measured.slowdown(("o", None), ("attention", None)) == 1.4
    assert measured.energy_ratio([("o", None), ("attention", 20)]) == 1.1
    # All depends on all here, so that nothing runs side by side after all.
    assert predict(schedule, measured, 3).layer_us == pytest.approx(16 * len(LAYER.operations))
    with pytest.raises(ProfileError, match="qkv was not measured; there are attention_norm"):
        predict(schedule, Measured(change(profile, points=profile.points[:2]), Mix(0, 8, 0, 1)), 3)


@pytest.fixture(scope="module", params=[480.0, 560.0, 4000.0], ids=lambda w: f"{w:g} W")
def taken(request: pytest.FixtureRequest) -> tuple[SyntheticDevice, Profile]:
    """A device at caps that bind hard, less, and not at all; and its profile, with 0.5 % noise."""
    device = capped(LAYER, request.param)
    return device, profiled(device, LAYER, loads_of(LAYER, device.sms, MIX))


def engine_like(rng: random.Random, graph: Graph) -> Schedule:
    """Products in one lane, attention in another, on some of the SMs; cut anywhere."""
    drawn = random_schedule(graph, 16, rng, max_lanes=2)
    launches = tuple(
        change(
            x,
            start=128 * x.start,
            stop=128 * x.stop,
            lane="memory" if x.operation == "attention" else "compute",
            waits=(),
            sms=rng.choice([None, 16, 24, 32, 48, 64]) if x.operation == "attention" else None,
        )
        for x in drawn.launches
    )
    return synchronise(change(drawn, tokens=2048, launches=launches), graph)


def test_plans_are_predicted_as_the_device_times_them(taken: tuple[SyntheticDevice, Profile]) -> None:
    device, profile = taken
    measured, rng = Measured(profile, MIX), random.Random(1)
    drawn = [sequential(LAYER, 2048), nano_batched(LAYER, 2048, 2, 128), *plans(LAYER, 2048).values()]
    drawn += [engine_like(rng, LAYER) for _ in range(20)]
    errors = []
    for schedule in drawn:
        predicted, timed = predict(schedule, measured, 6), device.time_plan(schedule, MIX, 6)
        errors.append(abs(predicted.layer_us / timed.layer_us - 1))
        assert predicted.power_w <= profile.header.power_cap_w * 1.001
    assert median(errors) < 0.05
    assert max(errors) < 0.10


def test_all_work_is_done_once_a_layer(taken: tuple[SyntheticDevice, Profile]) -> None:
    _, profile = taken
    rng = random.Random(2)
    for _ in range(5):
        schedule = engine_like(rng, LAYER)
        found = walk_at(schedule, Measured(profile, MIX, 1700.0), 6)
        assert found.done == pytest.approx([6.0] * len(schedule.launches))


def test_a_lower_cap_is_never_faster(taken: tuple[SyntheticDevice, Profile]) -> None:
    _, profile = taken
    schedule = engine_like(random.Random(3), LAYER)
    times_us = [
        predict(schedule, Measured(change(profile, header=change(profile.header, power_cap_w=cap)), MIX), 4).layer_us
        for cap in (400.0, 500.0, 600.0, 4000.0)
    ]
    assert times_us == sorted(times_us, reverse=True)
    assert times_us[0] > 1.05 * times_us[-1]


# what to measure


def test_the_points_to_measure_are_few_and_where_times_bend() -> None:
    loads = loads_of(LAYER, 132, MIX)
    points_ = len(loads.alone) + sum(anchor.two_clocks for anchor in loads.alone) + len(loads.together)
    assert points_ <= 150
    amounts = {a.load.amount for a in loads.alone if a.load.operation == "o"}
    assert {128, 1024, 1152, 2048, 2176, 4096} <= amounts  # 16 tiles across: 8 rows of tiles fill 132 SMs
    names = {a.load.operation for a in loads.alone}
    assert names == {op.name for op in LAYER.operations} - {"attention"} | {"attention/decode", "attention/prefill"}
    products = [op.name for op in LAYER.operations if op.resource is Resource.COMPUTE]
    for name in products:
        caps = [b.sms for a, b in loads.together if (a.operation, b.operation) == (name, "attention/decode")]
        assert caps == [16, 32, 48, 64, None]
    alone_at = {(a.load.operation, a.load.sms) for a in loads.alone}
    assert all((load.operation, load.sms) in alone_at for pair in loads.together for load in pair)
    assert len(set(loads.together)) == len(loads.together)
    assert {a.load for a in loads.alone if a.load.operation == "qkv"} <= {Load("qkv", n) for n in range(128, 4097, 128)}
    no_prompts = loads_of(LAYER, 132, Mix(512, 0, 1024, 0))
    assert "attention/prefill" not in {a.load.operation for a in no_prompts.alone}


def test_what_an_h200_did_follows_from_its_parts() -> None:
    """Products at two clocks and decode attention at one, as they were measured on an H200, foretell one after the
    other within 2 % (benchmarks/results/gpu_energy_h200.json; static power from the spin on every SM)."""
    result = json.loads((MODELS.parent / "results" / "gpu_energy_h200.json").read_text())
    measured = {(point["work"], point["idle_share"]): point for point in result["points"]}
    profile = Profile(
        header=header(static_w=185.0, power_cap_w=result["gpu_power_limit_w"]),
        points=tuple(
            Point(
                operation=work,
                amount=1.0,
                sms=100,
                duration_us=found["duration_us"],
                dynamic_j=(found["busy_power_w"] - 185.0) * found["duration_us"] * 1e-6,
                clock_mhz=found["sm_clock_mhz"],
                busy=1 - idle_share,
            )
            for work, idle_share in (("products", 0.0), ("products", 0.3), ("decode attention", 0.0))
            for found in [measured[work, idle_share]]
        ),
    )
    schedule = Schedule(tokens=1, launches=(launch("products", "a"), launch("decode attention", "a")))
    found = predict(schedule, Measured(profile, Mix(0, 1, 0, 1)), 1)
    both = measured["products, then decode attention", 0.0]
    assert found.layer_us == pytest.approx(both["duration_us"], rel=0.02)
    assert found.clock_mhz == pytest.approx(both["sm_clock_mhz"], rel=0.03)
    assert found.layer_j == pytest.approx(both["energy_mj"] / 1e3, rel=0.02)
