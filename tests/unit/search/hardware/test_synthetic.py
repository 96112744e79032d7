"""The synthetic device's law."""

from dataclasses import replace

import msgspec
import pytest
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.hardware.synthetic import LAUNCH_US, SyntheticDevice
from nanoflow_search.profile.load import Load, ProfileError
from support.places import LLAMA_3_8B

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.config.quantization import AT_LOAD, FP8
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

LAYER = build(read_model_config(LLAMA_3_8B)).layer
H200 = DEVICES["H200-sustained"]


def quiet(**fields: object) -> SyntheticDevice:
    return SyntheticDevice(LAYER, replace(H200, **fields), noise=0.0)


def test_a_solo_launch_takes_its_roof() -> None:
    device = quiet()
    flop = 2 * 2048 * 4096 * 6144
    found = device.time([Load("qkv", 2048)])
    assert found.durations_us[0] >= LAUNCH_US + 1e6 * flop / H200.flop_per_s
    half = device.time([Load("qkv", 2048, sms=66)])
    slower = 2 * 1980 / half.clock_mhz
    assert half.durations_us[0] - LAUNCH_US == pytest.approx(slower * 1e6 * flop / H200.flop_per_s)


def test_few_sms_saturate_memory() -> None:
    device = quiet()
    whole, few, fewer = (device.time([Load("attention/decode", 9e5, sms)]).durations_us[0] for sms in (None, 33, 16))
    assert few == pytest.approx(whole)
    assert fewer > 2 * few - 2 * LAUNCH_US


def test_neighbours_slow_each_other_down_on_both_sides() -> None:
    device = quiet()
    gemm, read = Load("gate_up", 1024, 96), Load("attention/decode", 9e5, 36)
    beside = device.time([gemm, read])
    assert beside.durations_us[1] >= device.time([read]).durations_us[0]
    shared = device.time([Load("gate_up", 1024), Load("attention/decode", 9e5)])
    assert shared.durations_us[0] > 1.9 * device.time([Load("gate_up", 1024)]).durations_us[0]


def test_the_clock_falls_until_power_fits() -> None:
    assert H200.power is not None
    frugal = quiet(power=replace(H200.power, cap_w=400.0))
    free = quiet(power=replace(H200.power, cap_w=4000.0))
    load = [Load("gate_up", 2048)]
    assert frugal.time(load).power_w <= 400
    assert frugal.time(load).power_w == pytest.approx(400, abs=2)
    assert frugal.time(load).clock_mhz < free.time(load).clock_mhz == 1980
    assert frugal.time(load).durations_us[0] > free.time(load).durations_us[0]


def test_pauses_raise_the_clock_and_heat_lowers_it() -> None:
    assert H200.power is not None
    device = quiet(power=replace(H200.power, cap_w=480.0))
    product, read = [Load("gate_up", 2048)], [Load("attention/decode", 9e5, 16)]
    full, half = device.time(product), device.time(product, 0.5)
    assert full.clock_mhz < half.clock_mhz
    assert full.durations_us[0] > half.durations_us[0]
    assert half.power_w > full.power_w == pytest.approx(480, abs=2)
    assert device.time(read).clock_mhz == 1980
    assert device.time(read, 0.5, heated=True).clock_mhz < 1980


def test_noise_is_seeded() -> None:
    one, two = (SyntheticDevice(LAYER, H200, seed=7).time([Load("o", 512)]) for _ in range(2))
    assert one == two != SyntheticDevice(LAYER, H200, seed=8).time([Load("o", 512)])


def test_unknown_operations_and_unknown_energies_are_refused() -> None:
    with pytest.raises(ProfileError, match="kqv: the model has no such operation"):
        quiet().time([Load("kqv", 1)])
    with pytest.raises(ProfileError, match="A100: no energies are known of it"):
        SyntheticDevice(LAYER, DEVICES["A100"])


def test_fp8_has_its_own_rates_bytes_and_joules() -> None:
    config = msgspec.structs.replace(read_model_config(LLAMA_3_8B), quantization=AT_LOAD, scaled_kv=True)
    precision = Precision(weights="bfloat16", activations="bfloat16", kv=FP8)
    assert H200.power is not None
    free = replace(H200, power=replace(H200.power, cap_w=4000.0))
    device = SyntheticDevice(build(config).layer, free, noise=0.0, precision=precision)
    flop = 2 * 2048 * 4096 * 28672
    product = device.time([Load("gate_up", 2048)])
    took_s = 1e-6 * (product.durations_us[0] - LAUNCH_US)
    assert took_s == pytest.approx(flop / 1261e12)
    dynamic_w = product.power_w - device.static_w
    assert dynamic_w == pytest.approx(flop * 0.413e-12 / (1e-6 * product.durations_us[0]))
    reads = (SyntheticDevice(LAYER, free, noise=0.0), device)
    whole, half = (each.time([Load("attention/decode", 9e5)]).durations_us[0] - LAUNCH_US for each in reads)
    assert half == pytest.approx(whole / 2, rel=0.01)
