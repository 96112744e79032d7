"""Profiles: their file, what lies between their points, how they are taken; the synthetic device's law."""

from dataclasses import replace
from pathlib import Path

import pytest
from msgspec.structs import replace as change
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.hardware.synthetic import LAUNCH_US, SyntheticDevice
from nanoflow_search.profile.data import Header, Load, Pair, Point, Profile, ProfileError, Surface, held_out
from nanoflow_search.profile.measure import Anchor, take_profile

from benchmarks.paper import a100_tables as a100
from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.models.hugging_face import read_model_config
from nanoflow_backend.models.model import build

MODELS = Path(__file__).parents[4] / "benchmarks" / "models"
LAYER = build(read_model_config(MODELS / "llama-3-8b")).layer
H200 = DEVICES["H200-sustained"]
HEADER = Header(
    model_fingerprint="f",
    precision=BFLOAT16,
    device="d",
    device_sms=132,
    tensor_parallel=1,
    static_w=185.0,
    power_cap_w=700.0,
)


def point(amount: float, sms: int, us: float, clock: float = 1980.0, joules: float = 0.0) -> Point:
    return Point(
        operation="qkv",
        amount=float(amount),
        sms=sms,
        duration_us=float(us),
        dynamic_j=joules or us / 1e4,
        clock_mhz=clock,
    )


SQUARE = Profile(
    header=HEADER, points=(point(100, 50, 40), point(200, 50, 70), point(100, 100, 20), point(200, 100, 40))
)


def quiet(**fields: object) -> SyntheticDevice:
    return SyntheticDevice(LAYER, replace(H200, **fields), noise=0.0)


# between the points


def test_linear_in_the_amount_and_in_the_inverse_of_sms() -> None:
    surface = SQUARE.surface("qkv")
    assert surface.duration_us(150, 100) == pytest.approx(30)
    assert surface.duration_us(300, 100) == pytest.approx(60)  # on from the last two
    assert surface.duration_us(50, 50) == pytest.approx(25)
    third = (1 / 75 - 1 / 100) / (1 / 50 - 1 / 100)
    assert surface.duration_us(100, 75) == pytest.approx(third * 40 + (1 - third) * 20)
    assert surface.duration_us(100) == surface.duration_us(100, 132) == 20  # no more were measured
    assert surface.dynamic_j(150, 100) == pytest.approx(0.003)
    with pytest.raises(ProfileError, match="qkv: 49 SMs, it was measured on 50 and more"):
        surface.duration_us(100, 49)


def test_a_step_of_waves_at_the_least_points_makes_no_launch_free() -> None:
    surface = Surface([point(512, 96, 48), point(640, 96, 72)])
    assert surface.duration_us(256, 96) == pytest.approx(24)  # the line through both is at 0
    assert surface.duration_us(500, 96) == pytest.approx(48 * 500 / 512)
    assert surface.dynamic_j(256, 96) == pytest.approx(0.0024)


def test_beyond_the_points_all_waves_count_and_not_the_last_step() -> None:
    """Two waves fill 1,536 tokens as they do 1,280: the last two points alone would have it that more cost nothing."""
    surface = Surface([point(512, 104, 100), point(1280, 104, 200), point(1536, 104, 200)])
    assert surface.duration_us(1400, 104) == pytest.approx(200)
    assert surface.duration_us(3072, 104) == pytest.approx(200 + 100 / 1024 * 1536)
    assert surface.dynamic_j(3072, 104) == pytest.approx(1e-4 * surface.duration_us(3072, 104))


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ProfileError, match="o was not measured; there are qkv"):
        SQUARE.surface("o")


def at(profile: Profile, clock_mhz: float, amount: float = 100, sms: int = 132) -> tuple[float, float]:
    surface = profile.surface("qkv", clock_mhz)
    return surface.duration_us(amount, sms), surface.dynamic_j(amount, sms)


def test_between_clocks_time_is_linear_in_the_period_and_energy_in_the_clock() -> None:
    both = Profile(header=HEADER, points=(point(100, 132, 90, 1800, 9.0), point(100, 132, 110, 1200, 7.0)))
    assert at(both, 1200) == pytest.approx((110, 7.0))
    assert at(both, 1800) == pytest.approx((90, 9.0))
    assert at(both, 1440) == pytest.approx((100, 7.8))  # 1 / 1440 is the middle
    assert at(both, 900) == pytest.approx((130, 6.0))  # on from there
    assert both.clocks_mhz == (1200, 1500, 1800)


def test_beyond_clocks_times_keep_to_physics() -> None:
    """Noise would have it that a lower clock saves time, or that it costs more than all cycles."""
    backwards = Profile(header=HEADER, points=(point(100, 132, 100, 1800, 8.0), point(100, 132, 99, 1200, 8.1)))
    assert at(backwards, 900) == pytest.approx((99, 8.1))
    assert at(backwards, 1980) == pytest.approx((100, 8.0))
    steep = Profile(header=HEADER, points=(point(100, 132, 100, 1800, 8.0), point(100, 132, 180, 1200, 4.0)))
    assert at(steep, 600) == pytest.approx((360, 2.0))


def test_a_point_of_one_clock_follows_the_nearest_that_has_two() -> None:
    two = (point(100, 132, 100, 1800, 9.0), point(100, 132, 125, 1200, 7.5))  # half of it cycles
    far = (point(900, 132, 100, 1800, 9.0), point(900, 132, 100, 1200, 9.0))
    profile = Profile(header=HEADER, points=(*two, *far, point(200, 132, 200, 1200, 15.0)))
    assert at(profile, 1800, 200) == pytest.approx((200 * 100 / 125, 18.0))
    alone = Profile(header=HEADER, points=(point(100, 132, 100, 1980, 9.0),))
    assert at(alone, 1400) == (100, 9.0)
    same = Profile(header=HEADER, points=(point(100, 132, 100, 1980), point(100, 132, 120, 1979)))
    assert same.clocks_mhz == (1980,)
    assert at(same, 990)[0] == 100  # too near each other to tell anything


def test_held_out_errors_are_those_of_points_that_were_left_out() -> None:
    line = [point(n, 132, 10 + n) for n in (100, 200, 400)]
    assert held_out(Profile(header=HEADER, points=tuple(line))).worst == pytest.approx(0)
    bent = Profile(header=HEADER, points=(line[0], point(200, 132, 300), line[2]))
    found = held_out(bent)
    assert found.worst == found.median == pytest.approx(1 - 210 / 300)
    assert found.worst_operation == "qkv"
    with pytest.raises(ProfileError, match="nothing can be held out"):
        held_out(SQUARE)


def test_the_papers_table_follows_from_times() -> None:
    layer = build(read_model_config(MODELS / "llama-2-70b"), 8).layer
    profile = a100.profile(layer, 8, a100.LLAMA_2_70B_TP8)
    found = profile.resource_to_performance("attention/decode", 1000 * a100.CONTEXT)
    assert found[round(0.4 * 108) / 108] == pytest.approx(0.8)
    assert list(found.values()) == pytest.approx(list(a100.PUBLISHED["attention"].values()))
    surface = profile.surface("gate_up")
    assert surface.duration_us(640) == pytest.approx(287)
    assert surface.duration_us(1408, 54) == pytest.approx(2 * 587)


# the file


def test_round_trip_is_exact(tmp_path: Path) -> None:
    pair = Pair(
        first="qkv", first_sms=None, second="attention", second_sms=56, first_slowdown=1.1, second_slowdown=1.2,
        power_w=690.0, clock_mhz=1500.0,
    )  # fmt: skip
    profile = change(SQUARE, pairs=(pair,))
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert Profile.load(path).hash() == profile.hash() != SQUARE.hash()
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_bad_file_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ProfileError, match=r"profile\.json: No such file"):
        Profile.load(path)
    change(SQUARE, header=change(HEADER, format_version=1)).save(path)
    with pytest.raises(ProfileError, match=r"profile\.json: format version 1, expected 3: measure it anew"):
        Profile.load(path)
    SQUARE.save(path)
    path.write_text(path.read_text().replace('"sms"', '"SMs"', 1))
    with pytest.raises(ProfileError, match=r"unknown field `SMs` - at `\$\.points\[0\]`"):
        Profile.load(path)
    path.write_bytes(b"{")
    with pytest.raises(ProfileError, match=r"profile\.json: Input data was truncated"):
        Profile.load(path)


# the synthetic device, and taking a profile of it


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


class Cut(Exception):
    pass


def test_a_profile_that_was_cut_goes_on(tmp_path: Path) -> None:
    """Killed after any point, the next run measures the rest and no point twice; the fit holds what was left out."""
    path = tmp_path / "profile.json"
    alone = [Anchor(Load(op, n, sms)) for op in ("qkv", "o") for n in (256, 512, 1024) for sms in (64, None)]
    alone += [Anchor(Load("attention/decode", 4e5, sms), two_clocks=True) for sms in (36, None)]
    together = [
        (Load("qkv", 512), Load("attention/decode", 4e5)),
        (Load("o", 512, 96), Load("attention/decode", 4e5, 36)),
    ]
    device = SyntheticDevice(LAYER, H200, noise=0.0)
    taken: list[str] = []

    def cut_at_every_third(what: str) -> None:
        if len(taken) % 3 == 2 and what not in taken:
            taken.append(what)
            raise Cut
        taken.append(what)

    profile = None
    while profile is None:
        try:
            profile = take_profile(device, HEADER, alone, together, path, cut_at_every_third)
        except Cut:
            continue
    assert len(profile.points) == len(alone) + 2 == len({str(p) for p in profile.points})
    assert [p.heated for p in profile.points if p.busy < 1] == [True, True]
    assert len(profile.pairs) == 2
    assert all(pair.first_slowdown >= 1 and pair.second_slowdown >= 1 for pair in profile.pairs)
    assert Profile.load(path) == profile
    assert held_out(profile).worst < 0.02
    before = len(taken)
    assert take_profile(device, HEADER, alone, together, path, taken.append) == profile
    assert len(taken) == before
    with pytest.raises(ProfileError, match="was taken of"):
        take_profile(device, change(HEADER, device="another"), alone, together, path)
