"""From which reading of the KV cache on a plan is worth its cuts: by prediction, against the device's own law."""

from dataclasses import replace

import msgspec
import pytest
from nanoflow_search.cost.workload import MeanWorkload, Mix, ramp_mix
from nanoflow_search.emit.threshold import RAMP_STEPS, least_decode_kv_tokens
from nanoflow_search.hardware.machine import SyntheticMachine
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.plan.batch_case import BatchCase
from nanoflow_search.profile.points import partition_loads
from nanoflow_search.request import SearchRequest
from support.places import LLAMA_3_8B
from support.simulated.profiles import profiled

from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.presets import overlapped, sequential

WORKLOAD = "1024/512"
BOTH = (WORKLOAD, "512/1024")
WHOLE = SearchRequest.of(LLAMA_3_8B, 1, BOTH)
REQUEST = replace(WHOLE, config=msgspec.structs.replace(WHOLE.config, num_layers=8))  # all alike: time is per layer
SIZES = (28, 32, 36)  # SMs of attention
LAYER, LAYERS, TOKENS = REQUEST.model.layer, REQUEST.model.num_layers, 2048


@pytest.fixture(scope="module")
def device() -> SyntheticDevice:
    return SyntheticMachine().load_runner(REQUEST, Mix(1, 1, 1, 1))


@pytest.fixture(scope="module")
def case(device: SyntheticDevice) -> BatchCase:
    mix = REQUEST.mix(WORKLOAD, TOKENS, device.name)
    loads = partition_loads(LAYER, device.sms, mix, TOKENS, sizes=SIZES)
    return BatchCase(REQUEST, profiled(device, LAYER, loads), TOKENS)


def halves(sms: int) -> Schedule:
    return overlapped(LAYER, TOKENS, TOKENS // 2, 0.5, sms, 132, granularity=128)


def ramp(case: BatchCase, workload: str) -> list[Mix]:
    steady = case.mix(workload)
    return [ramp_mix(MeanWorkload.parse(workload), steady, step / RAMP_STEPS) for step in range(RAMP_STEPS + 1)]


def reading(mix: Mix) -> float:
    return mix.decode_tokens * mix.decode_context


def gain(device: SyntheticDevice, plan: Schedule, mix: Mix) -> float:
    """By the law."""
    alone, cut = (device.time_plan(schedule, mix, LAYERS).layer_us for schedule in (sequential(LAYER, TOKENS), plan))
    return alone / cut


def test_a_ramp_ends_in_the_steady_state(case: BatchCase) -> None:
    mixes = ramp(case, WORKLOAD)
    assert mixes[-1] == case.mix(WORKLOAD)
    assert all(mix.tokens == pytest.approx(TOKENS) for mix in mixes)
    assert reading(mixes[0]) == 0
    # Half of the requests run, of ages that spread evenly over half an output.
    ages = [512 / 2 * (i + 0.5) / 1000 for i in range(1000)]
    assert mixes[RAMP_STEPS // 2].decode_context == pytest.approx(1024 + sum(ages) / 1000)
    assert mixes[RAMP_STEPS // 2].decode_tokens == case.mix(WORKLOAD).decode_tokens / 2


@pytest.mark.parametrize("sms", SIZES)
@pytest.mark.parametrize("workload", BOTH)
def test_a_plan_gains_from_its_condition_on_and_hardly_before(
    device: SyntheticDevice, case: BatchCase, sms: int, workload: str
) -> None:
    plan, mixes = halves(sms), ramp(case, workload)
    least = least_decode_kv_tokens(case, plan, {workload: gain(device, plan, mixes[-1])})
    by_law = {reading(mix): gain(device, plan, mix) for mix in mixes}
    assert 0 < least < reading(mixes[-1])
    assert all(found > 1 for read, found in by_law.items() if read >= least)
    before = [found for read, found in by_law.items() if read < least]
    assert before[0] < 0.9, "with no decodes at all"
    assert max(before) < 1.05, "but for what predictions are off, nothing is passed up"


def test_what_was_measured_corrects_what_was_predicted(case: BatchCase) -> None:
    plan, steady = halves(32), round(reading(case.mix(WORKLOAD)))
    least = [least_decode_kv_tokens(case, plan, {WORKLOAD: gain}) for gain in (1.003, 1.05, 1.1, 1.2, 1.5, 3.0)]
    assert least == sorted(least, reverse=True)
    assert least[0] == steady, "it won there, by less than the margin"
    assert len(set(least)) == len(least)
    assert least[-1] == 0, "it gains even where nothing decodes"


def test_a_plan_for_several_workloads_gains_on_each(case: BatchCase) -> None:
    plan, gains = halves(32), dict(zip(BOTH, (1.05, 1.2), strict=True))
    each = [least_decode_kv_tokens(case, plan, {workload: gain}) for workload, gain in gains.items()]
    assert each[0] != each[1]
    assert least_decode_kv_tokens(case, plan, gains) == max(each)
