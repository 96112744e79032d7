"""Predictions of whole schedules: against closed forms, against a device that times plans by its own law, and work is
neither lost nor done twice."""

import json
import random
from statistics import median

import pytest
from msgspec.structs import replace as change
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import predict, simulate_at
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.data import Pair, Profile, ProfileHeader
from nanoflow_search.profile.load import Load, Point, ProfileError
from nanoflow_search.profile.points import shared_loads
from support.places import LLAMA_3_8B, MODELS
from support.schedule.schedules import plans, random_schedule
from support.simulated.profiles import capped, profiled

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.plan import Launch, Schedule, Wait
from nanoflow_backend.schedule.presets import nano_batched, sequential, synchronise

LAYER = build(read_model_config(LLAMA_3_8B)).layer
MIX = Mix(1365, 683, 1024, 256)


def launch(operation: str, lane: str, *waits: Wait, start: int = 0, stop: int = 1, **fields: int) -> Launch:
    return Launch(operation=operation, start=start, stop=stop, lane=lane, waits=waits, **fields)


def header(**fields: float) -> ProfileHeader:
    shape = {"static_w": 200.0, "power_cap_w": 700.0} | fields
    return ProfileHeader(
        model_fingerprint="f", precision=BFLOAT16, device="d", device_sms=100, tensor_parallel=1, **shape
    )


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
    found = predict(schedule, TimingModel(cool, Mix(0, 8, 0, 1)), 4)
    assert found.layer_us == pytest.approx(16 * count)
    assert (found.clock_mhz, found.power_w) == pytest.approx((2000, 600))
    # P(f) = 200 + 1000 (f / 2000)^2 = 700: time goes with 1 / f, energy with f.
    hot = Profile(header=header(), points=tuple(points(LAYER, 2.0, 1000.0, cycles=True)))
    found = predict(schedule, TimingModel(hot, Mix(0, 8, 0, 1)), 4)
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
    measured = TimingModel(profile, Mix(0, 8, 0, 1))
    assert measured.slowdown(("o", None), ("attention", None)) == 2  # never measured: in turns
    pair = Pair(first="o", first_sms=None, second="attention", second_sms=30, first_slowdown=1.2,
                second_slowdown=1.6, power_w=0.0, clock_mhz=0.0, energy_ratio=1.1)  # fmt: skip
    far = change(pair, second_sms=80, first_slowdown=1.4, energy_ratio=1.3)
    measured = TimingModel(change(profile, pairs=(pair, far)), Mix(0, 8, 0, 1))
    assert measured.slowdown(("o", None), ("attention", 40)) == 1.2
    assert measured.slowdown(("attention", 40), ("o", None)) == 1.6
    assert measured.slowdown(("o", None), ("attention", None)) == 1.4
    assert measured.energy_ratio([("o", None), ("attention", 20)]) == 1.1
    # All depends on all here, so that nothing runs side by side after all.
    assert predict(schedule, measured, 3).layer_us == pytest.approx(16 * len(LAYER.operations))
    with pytest.raises(ProfileError, match="qkv was not measured; there are attention_norm"):
        predict(schedule, TimingModel(change(profile, points=profile.points[:2]), Mix(0, 8, 0, 1)), 3)


@pytest.fixture(scope="module", params=[480.0, 560.0, 4000.0], ids=lambda w: f"{w:g} W")
def taken(request: pytest.FixtureRequest) -> tuple[SyntheticDevice, Profile]:
    """A device at caps that bind hard, less, and not at all; and its profile, with 0.5 % noise."""
    device = capped(LAYER, request.param)
    return device, profiled(device, LAYER, shared_loads(LAYER, device.sms, MIX))


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
    measured, rng = TimingModel(profile, MIX), random.Random(1)
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
        found = simulate_at(schedule, TimingModel(profile, MIX, 1700.0), 6)
        assert found.done == pytest.approx([6.0] * len(schedule.launches))


def test_a_lower_cap_is_never_faster(taken: tuple[SyntheticDevice, Profile]) -> None:
    _, profile = taken
    schedule = engine_like(random.Random(3), LAYER)
    times_us = [
        predict(schedule, TimingModel(change(profile, header=change(profile.header, power_cap_w=cap)), MIX), 4).layer_us
        for cap in (400.0, 500.0, 600.0, 4000.0)
    ]
    assert times_us == sorted(times_us, reverse=True)
    assert times_us[0] > 1.05 * times_us[-1]


def test_the_points_to_measure_are_few_and_where_times_bend() -> None:
    loads = shared_loads(LAYER, 132, MIX)
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
    no_prompts = shared_loads(LAYER, 132, Mix(512, 0, 1024, 0))
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
    found = predict(schedule, TimingModel(profile, Mix(0, 1, 0, 1)), 1)
    both = measured["products, then decode attention", 0.0]
    assert found.layer_us == pytest.approx(both["duration_us"], rel=0.02)
    assert found.clock_mhz == pytest.approx(both["sm_clock_mhz"], rel=0.03)
    assert found.layer_j == pytest.approx(both["energy_mj"] / 1e3, rel=0.02)
