"""The search's device and timer on a GPU: a small model's operations and plans, for moments."""

from pathlib import Path

import pytest
import torch
from nanoflow_search.cost.workload import Mix
from nanoflow_search.plan.partitions import partitions_of
from nanoflow_search.predict.predict import predict
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.profile.load import Load
from nanoflow_search.profile.measure import profile_header, take_profile
from nanoflow_search.profile.points import partition_loads, shared_loads
from support.models.shapes import CONFIGS, config

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.presets import nano_batched, overlapped, sequential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIX = Mix(40, 88, 256.0, 64.0)
SECONDS = 0.2
FP8_KV = Precision(weights="bfloat16", activations="bfloat16", kv=FP8)


def shape(name: str, in_fp8: bool = False) -> ModelConfig:
    fp8 = {"quantization": AT_LOAD, "scaled_kv": True} if in_fp8 else {}
    return config(name, hidden_size=512, intermediate_size=1024, head_dim=64, vocab_size=1000, dtype="bfloat16", **fp8)


@pytest.mark.parametrize("precision", [BFLOAT16, FP8_KV], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_load_of_a_model_runs(name: str, precision: Precision, tmp_path: Path) -> None:
    from nanoflow_search.hardware.gpu import GpuLoadRunner

    made = shape(name, precision is FP8_KV)
    device, graph = GpuLoadRunner.here(made, MIX, seconds=SECONDS, precision=precision), build(made).layer
    loads = shared_loads(graph, device.sms, MIX, largest_tokens=128)
    # One amount of each is enough here.
    alone = {(a.load.operation, a.load.sms): a for a in loads.alone}.values()
    header = profile_header(device, graph, precision=precision)
    profile = take_profile(device, header, alone, loads.together[:3], tmp_path / "profile.json")
    assert all(p.duration_us > 0 for p in profile.points if not p.operation.endswith("_reduce"))
    assert all(0 < p.clock_mhz <= device.highest_clock_mhz for p in profile.points)
    assert 0 < profile.header.static_w < profile.header.power_cap_w
    assert len(profile.pairs) == 3
    found = predict(sequential(graph, 128), TimingModel(profile, MIX), 3)
    assert found.layer_us > 0


def test_plans_with_sms_of_their_own_are_profiled_predicted_and_timed(tmp_path: Path) -> None:
    from nanoflow_search.hardware.gpu import GpuLoadRunner
    from nanoflow_search.hardware.plan_timer import PlanTimer

    made = shape("llama")
    device, layer = GpuLoadRunner.here(made, MIX, seconds=SECONDS), build(made).layer
    loads = partition_loads(layer, device.sms, MIX, 128, sizes=(32, 40))
    path = tmp_path / "profile.json"
    profile = take_profile(device, profile_header(device, layer), loads.alone, loads.together, path)
    timer = PlanTimer.here(made, MIX, seconds=SECONDS)
    assert len(partitions_of(profile, layer)) == 2
    for partition in partitions_of(profile, layer):
        plan = overlapped(layer, 128, 64, 0.5, partition["memory"], device.sms)
        assert predict(plan, TimingModel(profile, MIX), 3).layer_us > 0
        assert timer(plan).layer_us > 0


def test_few_sms_take_longer() -> None:
    """A launch keeps to its SMs: decode attention is not as fast on a few as on all."""
    from nanoflow_search.hardware.gpu import GpuLoadRunner

    device = GpuLoadRunner.here(shape("llama"), MIX, seconds=SECONDS)
    few, whole = (device.time([Load("attention/decode", 1_000_000, sms)]).durations_us[0] for sms in (16, None))
    assert few > 1.5 * whole


def test_a_large_product_takes_longer_than_a_small_one() -> None:
    from nanoflow_search.hardware.gpu import GpuLoadRunner

    device = GpuLoadRunner.here(shape("llama"), MIX, seconds=SECONDS)
    small, large = (device.time([Load("gate_up", n)]).durations_us[0] for n in (1024, 16384))
    assert large > 4 * small


@pytest.mark.parametrize("precision", [BFLOAT16, FP8_KV], ids=["bf16", "fp8"])
def test_plans_are_timed_in_the_engines_program(precision: Precision) -> None:
    from nanoflow_search.hardware.plan_timer import PlanTimer

    made = shape("llama", precision is FP8_KV)
    timer, layer = PlanTimer.here(made, MIX, seconds=SECONDS, precision=precision), build(made).layer
    for schedule in (sequential(layer, 128), nano_batched(layer, 128, 2)):
        found = timer(schedule)
        assert found.layer_us > 0
        assert found.layer_j == pytest.approx(found.power_w * found.layer_us * 1e-6)
