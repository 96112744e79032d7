"""Profiles: their file, and how far off they are between their points."""

from pathlib import Path

import pytest
from msgspec.structs import replace as change
from nanoflow_search.profile.data import Pair, Profile, ProfileHeader, held_out
from nanoflow_search.profile.load import Point, ProfileError

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


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ProfileError, match="o was not measured; there are qkv"):
        SQUARE.surface("o")


def test_held_out_errors_are_those_of_points_that_were_left_out() -> None:
    line = [point(n, 132, 10 + n) for n in (100, 200, 400)]
    assert held_out(Profile(header=HEADER, points=tuple(line))).worst == pytest.approx(0)
    bent = Profile(header=HEADER, points=(line[0], point(200, 132, 300), line[2]))
    found = held_out(bent)
    assert found.worst == found.median == pytest.approx(1 - 210 / 300)
    assert found.worst_operation == "qkv"
    with pytest.raises(ProfileError, match="nothing can be held out"):
        held_out(SQUARE)


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
