"""Plans whose attention has SMs of its own: what is measured for them, how they are predicted, which are found."""

import random
import sys

import pytest
from nanoflow_search.checkpoint import Run
from nanoflow_search.cost.workload import Mix
from nanoflow_search.emit.picture import simulated_period
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.plan.op_graph import layer_problem
from nanoflow_search.plan.partitions import FEW_LAYERS, KEPT, best_by_grid, find_partitioned, partitions_of
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import UNMEASURED_SLOWDOWN, TimingModel
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.load import ProfileError
from nanoflow_search.profile.points import partition_loads
from nanoflow_search.request import Effort
from support.places import LLAMA_3_8B
from support.simulated.profiles import capped, profiled

from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.presets import overlapped, sequential
from nanoflow_backend.schedule.validate import validate

LAYER = build(read_model_config(LLAMA_3_8B)).layer
MIX = Mix(704, 1344, 1280, 512)


@pytest.fixture(scope="module", params=[560.0, 700.0])
def taken(request: pytest.FixtureRequest) -> tuple[SyntheticDevice, Profile]:
    """A device whose cap binds products alone, and one where it binds them only beside attention."""
    device = capped(LAYER, request.param)
    return device, profiled(device, LAYER, partition_loads(LAYER, device.sms, MIX))


def test_own_sms_say_nothing_about_shared_ones(taken: tuple[SyntheticDevice, Profile]) -> None:
    measured = TimingModel(taken[1], MIX)
    assert measured.slowdown(("down", 100), ("attention/decode", 32)) < 1.5
    assert measured.slowdown(("down", 84), ("attention/decode", 48)) < 1.5  # the nearest that was measured
    assert measured.slowdown(("down", None), ("attention/decode", None)) == UNMEASURED_SLOWDOWN


def test_partitioned_plans_are_predicted_as_the_device_times_them(taken: tuple[SyntheticDevice, Profile]) -> None:
    """An energy that goes with the clock's square is a straight line to a profile: it is told a little too high."""
    device, profile = taken
    measured, rng = TimingModel(profile, MIX), random.Random(1)
    for partition in partitions_of(profile, LAYER):
        for _ in range(4):
            stop, share = 128 * rng.randint(4, 12), rng.choice((0.2, 0.35, 0.5, 0.65))
            plan = overlapped(LAYER, 2048, stop, share, partition["memory"], 132, 128)
            predicted, timed = predict(plan, measured, 8), device.time_plan(plan, MIX, 8)
            assert predicted.layer_us == pytest.approx(timed.layer_us, rel=0.08)
            assert predicted.power_w <= profile.header.power_cap_w * 1.001


def test_attention_reads_what_its_groups_hold(taken: tuple[SyntheticDevice, Profile]) -> None:
    measured = TimingModel(taken[1], MIX).with_groups(overlapped(LAYER, 2048, 1024, 0.25, 32, 132).groups)
    assert measured.loads(("attention",), 0, 1024) == [
        ("attention/decode", 176 * 1280),
        ("attention/prefill", (1024 - 176) * 512),
    ]
    assert measured.loads(("attention",), 1024, 2048)[0] == ("attention/decode", 528 * 1280)


def test_the_best_plans_are_valid_unlike_and_faster_than_sequential(taken: tuple[SyntheticDevice, Profile]) -> None:
    device, profile = taken
    two_sizes = [p for p in profile.points if p.sms in (28, 32, 100, 104, 132) or is_small(p.operation)]
    few = Profile(header=profile.header, points=tuple(two_sizes), pairs=profile.pairs)
    assert [partition["memory"] for partition in partitions_of(few, LAYER)] == [28, 32]
    measured = TimingModel(few, MIX)
    found = find_partitioned(LAYER, measured, 6, 512, Effort(turns=1, time_limit_s=10.0), Run(), keep=3, step=256)
    assert [f.predicted.layer_us for f in found] == sorted(f.predicted.layer_us for f in found)
    assert len({(f.schedule.partition["memory"], *(g.stop for g in f.schedule.groups)) for f in found}) == 3
    base = device.time_plan(sequential(LAYER, 2048), MIX, 6).layer_us
    for schedule, predicted, _ in found:
        validate(schedule, LAYER, 6, 132)
        assert predicted == predict(schedule, measured, 6)
        assert device.time_plan(schedule, MIX, 6).layer_us < base


def test_without_turns_it_is_the_grid_alone(
    taken: tuple[SyntheticDevice, Profile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And there need be no solver."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    measured = TimingModel(taken[1], MIX)
    (best, *_) = find_partitioned(LAYER, measured, 3, 512, Effort(turns=0), Run(), step=512)
    brute = [
        predict(overlapped(LAYER, 2048, stop, share, partition["memory"], 132, 512), measured, 3)
        for partition in partitions_of(taken[1], LAYER)
        for stop in (512, 1024, 1536)
        for share in [round(stop / 2048 + more, 2) for more in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    ]
    assert best.predicted == min(brute, key=lambda timing: timing.layer_us)


def test_the_best_of_the_grid_is_nearly_that_of_all_plans_on_all_layers(
    taken: tuple[SyntheticDevice, Profile],
) -> None:
    """On few layers the ramps weigh more, and only the best of each cut there is looked at again."""
    _, profile = taken
    layers, mix = 2 * FEW_LAYERS, Mix(300, 468, 1280, 512)
    measured = TimingModel(profile, mix)
    brute_us = [
        predict(overlapped(LAYER, 768, stop, share, partition["memory"], 132, 128), measured, layers).layer_us
        for partition in partitions_of(profile, LAYER)
        for stop in (256, 384, 512)
        for share in [round(stop / 768 + more, 2) for more in (-0.2, -0.1, 0.0, 0.1, 0.2)]
    ]
    best_us = predict(best_by_grid(LAYER, measured, layers), measured, layers).layer_us
    of_few = find_partitioned(LAYER, measured, FEW_LAYERS, 128, Effort(turns=0), Run(), keep=99)
    assert len(of_few) == KEPT
    assert best_us == min(predict(found.schedule, measured, layers).layer_us for found in of_few)
    assert min(brute_us) <= best_us < 1.005 * min(brute_us)
    shared = Profile(header=profile.header, points=tuple(p for p in profile.points if p.sms == 132))
    with pytest.raises(ProfileError, match="were not measured on SMs of their own"):
        best_by_grid(LAYER, TimingModel(shared, mix), layers)


def is_small(curve: str) -> bool:
    operation = LAYER[curve.partition("/")[0]]
    return operation.resource is not Resource.COMPUTE and operation.kernel != "attention"


def test_a_plan_is_drawn_as_it_is_predicted(taken: tuple[SyntheticDevice, Profile]) -> None:
    measured = TimingModel(taken[1], MIX)
    plan = overlapped(LAYER, 2048, 1024, 0.5, 32, 132)
    shares = simulated_period(plan, layer_problem(LAYER, 1, 2048, 128, measured.operations_us), measured, 128)
    placed = shares.timeline.placed
    # The ramps at the first and the last layer are in the prediction alone.
    assert shares.timeline.period_us == pytest.approx(predict(plan, measured, 32).layer_us, rel=0.03)
    assert {(p.nano.start, p.nano.stop) for p in placed} == {(0, 8), (8, 16)}
    assert {p.nano.task for p in placed if shares.sms[p.nano] == 32} == {"attention"}
    assert {p.nano.task for p in placed if p.layers_ahead} == {"qkv", "attention"}
    for attends in (True, False):
        lane = [p for p in placed if (p.nano.task == "attention") == attends]
        busy_us = sum(p.duration_us for p in lane)
        assert busy_us <= shares.timeline.period_us * 1.001
    assert busy_us == pytest.approx(shares.timeline.period_us, rel=0.1), "the SMs of products hardly ever wait"
