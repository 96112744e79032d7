"""A profile is what was measured of a model's operations on a machine: loads alone, and pairs side by side."""

from __future__ import annotations

import hashlib
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from nanoflow_backend.config.precision import Precision
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.file import fingerprint
from nanoflow_search.profile.load import Point, ProfileError
from nanoflow_search.profile.surface import SAME_CLOCK, Surface, at_clock

PROFILE_FORMAT_VERSION = 3  # 3: precision


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two loads that ran side by side: how much longer each took than alone on as many SMs at the same clock."""

    first: str  # curve of the first load
    first_sms: int | None  # the most SMs that it may use, launched as the engine launches it; None: no limit
    second: str
    second_sms: int | None
    first_slowdown: float  # time beside the other over time alone
    second_slowdown: float
    power_w: float  # of the whole device
    clock_mhz: float
    energy_ratio: float = 1.0  # dynamic energy of both side by side over the sum of each alone


class ProfileHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a profile was taken of: a layer, by its fingerprint, on a device."""

    format_version: int = PROFILE_FORMAT_VERSION
    model_fingerprint: str
    precision: Precision
    device: str
    device_sms: int
    tensor_parallel: int
    static_w: float
    power_cap_w: float

    def mismatch(self, layer: Graph, precision: Precision, ranks: int) -> str | None:
        """Say what the profile was taken of, and what is here; None: the same."""
        here = (fingerprint(layer), precision, ranks)
        taken = (self.model_fingerprint, self.precision, self.tensor_parallel)
        if taken == here:
            return None
        return (
            f"was taken of layer {taken[0]} in {taken[1]} on {taken[2]} rank(s), and here is {here[0]} in {here[1]} on "
            f"{here[2]}"
        )


class _Version(msgspec.Struct):
    format_version: int


class _Versioned(msgspec.Struct):
    header: _Version


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Points of every operation alone, over amount, SMs and clock; and pairs, with the effect on both sides."""

    header: ProfileHeader
    points: tuple[Point, ...] = ()
    pairs: tuple[Pair, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile from a JSON file.

        Raises:
            ProfileError: the file cannot be read; the message names the file and the place in it.
        """
        try:
            content = path.read_bytes()
            version = msgspec.json.decode(content, type=_Versioned).header.format_version
            if version != PROFILE_FORMAT_VERSION:  # before keys that another version may have
                raise ProfileError(
                    f"{path}: format version {version}, expected {PROFILE_FORMAT_VERSION}: measure it anew"
                )
            return msgspec.json.decode(content, type=cls)
        except OSError as error:
            raise ProfileError(f"{path}: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the profile as JSON, all of it or nothing, so that a run that is cut can go on from the file."""
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        partial.replace(path)

    def hash(self) -> str:
        """Return 16 hexadecimal digits that stand for the content."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    @property
    def operations(self) -> tuple[str, ...]:
        """The curves that were measured: names of operations, and attention's two curves."""
        return tuple(dict.fromkeys(point.operation for point in self.points))

    @property
    def clocks_mhz(self) -> tuple[float, ...]:
        """The clock levels to plan at, ascending: the lowest and the highest that were measured, and the middle."""
        measured = [point.clock_mhz for point in self.points]
        low, high = min(measured, default=0.0), max(measured, default=0.0)
        return (low, (low + high) / 2, high) if high - low > SAME_CLOCK * high else (high,)

    def surface(self, operation: str, clock_mhz: float | None = None) -> Surface:
        """Return the surface of one operation at a clock (None: the highest that was measured).

        Raises:
            ProfileError: the operation was not measured.
        """
        points = [p for p in self.points if p.operation == operation]
        if not points:
            raise ProfileError(f"{operation} was not measured; there are {', '.join(self.operations)}")
        return Surface(at_clock(points, clock_mhz or max(self.clocks_mhz)))


class HeldOut(NamedTuple):
    """Relative errors of the interpolation at points that it did not see."""

    median: float
    worst: float
    worst_operation: str


def held_out(profile: Profile) -> HeldOut:
    """Interpolate every inner point of a profile from its neighbours, and compare.

    Raises:
        ProfileError: no operation was measured at three amounts on one number of SMs.
    """
    errors = [(error, name) for name in profile.operations for error in profile.surface(name).held_out_errors()]
    if not errors:
        raise ProfileError("no operation was measured at three amounts: nothing can be held out")
    return HeldOut(median(error for error, _ in errors), *max(errors))
