"""Surfaces: what lies between the points of a profile."""

import pytest
from nanoflow_search.profile.data import Profile, ProfileHeader
from nanoflow_search.profile.load import Point, ProfileError
from nanoflow_search.profile.surface import Surface

from nanoflow_backend.config.precision import BFLOAT16

HEADER = ProfileHeader(
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
