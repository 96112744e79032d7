"""Profile: what was measured of a model's operations on a machine, and what follows from it between the points.

An operation's *amount* is what its time grows with: tokens; for decode attention the keys that it reads, for prefill
attention the pairs of query and key.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

import msgspec

FORMAT_VERSION = 1


class ProfileError(ValueError):
    """A profile that cannot be used: the message names the file or the operation, and what is missing."""


class Load(NamedTuple):
    """An operation to run again and again, on `amount` of its unit."""

    operation: str
    amount: float
    sms: int | None = None  # a cap; None: all of the device


class Measurement(NamedTuple):
    """Loads that ran side by side, each back to back with itself, in the sustained state."""

    durations_us: tuple[float, ...]  # of one launch of each load, beside the others
    power_w: float  # of the whole device
    clock_mhz: float


class Device(Protocol):
    """What can be profiled: a GPU, or a law that stands for one."""

    name: str
    sms: int
    static_w: float
    power_cap_w: float
    clocks_mhz: tuple[float, ...]  # levels that can be asked for, ascending

    def time(self, loads: Sequence[Load], clock_mhz: float | None = None) -> Measurement:
        """Run `loads` side by side until times, power and clock stand still. The clock is a limit; None: the highest.

        Raises:
            ProfileError: an operation that it does not know.
        """
        ...


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A load that ran alone."""

    operation: str
    amount: float
    sms: int  # granted
    duration_us: float
    dynamic_j: float  # of one launch, beyond static power
    clock_mhz: float  # that the power left
    limit_mhz: float  # that was asked for


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two loads that ran side by side: how much longer each took than alone with the same SMs."""

    first: str
    first_sms: int | None  # None: all SMs, shared with the other
    second: str
    second_sms: int | None
    first_slowdown: float
    second_slowdown: float
    power_w: float
    clock_mhz: float


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format_version: int = FORMAT_VERSION
    model_fingerprint: str
    device: str
    device_sms: int
    tensor_parallel: int
    static_w: float
    power_cap_w: float


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Points of every operation alone, over amount, SMs and clock limit; and of pairs, on both sides."""

    header: Header
    points: tuple[Point, ...] = ()
    pairs: tuple[Pair, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises: ProfileError, naming the file and the place in it."""
        try:
            profile = msgspec.json.decode(path.read_bytes(), type=cls)
        except OSError as error:
            raise ProfileError(f"{path}: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path}: {error}") from None
        if profile.header.format_version != FORMAT_VERSION:
            raise ProfileError(f"{path}: format version {profile.header.format_version}, expected {FORMAT_VERSION}")
        return profile

    def save(self, path: Path) -> None:
        """At once or not at all, so that a run that is cut can go on from the file."""
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        partial.replace(path)

    def hash(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]

    @property
    def operations(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(point.operation for point in self.points))

    @property
    def limits_mhz(self) -> tuple[float, ...]:
        return tuple(sorted({point.limit_mhz for point in self.points}))

    def surface(self, operation: str, limit_mhz: float | None = None) -> Surface:
        """Of one operation at a clock limit; None: the highest. Raises: ProfileError, it was not measured."""
        limit = limit_mhz if limit_mhz is not None else max(self.limits_mhz, default=0.0)
        points = [p for p in self.points if p.operation == operation and p.limit_mhz == limit]
        if not points:
            raise ProfileError(f"{operation} at {limit:g} MHz was not measured; there are {', '.join(self.operations)}")
        return Surface(points)

    def resource_to_performance(self, operation: str, amount: float) -> dict[float, float]:
        """The paper's table: the share of the SMs, R -> the performance that it leaves of the best alone, P."""
        surface = self.surface(operation)
        best = min(surface.duration_us(amount, sms) for sms in surface.shares)
        return {sms / self.header.device_sms: best / surface.duration_us(amount, sms) for sms in surface.shares}


class Surface:
    """Time and energy of an operation over amount and SMs.

    Linear in the amount between its points, and on from the outermost two; over SMs linear in 1 / SMs, which is what
    work that divides evenly follows. A share below the least measured is refused: nothing is known there.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.operation = points[0].operation
        self._curves: dict[int, list[Point]] = {}
        for point in sorted(points, key=lambda p: (p.sms, p.amount)):
            self._curves.setdefault(point.sms, []).append(point)

    @property
    def shares(self) -> tuple[int, ...]:
        """SMs at which it was measured."""
        return tuple(self._curves)

    def duration_us(self, amount: float, sms: int | None = None) -> float:
        return self._at(amount, sms, "duration_us")

    def dynamic_j(self, amount: float, sms: int | None = None) -> float:
        return self._at(amount, sms, "dynamic_j")

    def held_out_errors(self) -> list[float]:
        """For each point that lies between others of its share: relative error of the time if it were not there."""
        errors = []
        for sms, curve in self._curves.items():
            for point in curve[1:-1]:
                rest = Surface([p for p in curve if p is not point])
                errors.append(abs(rest.duration_us(point.amount, sms) / point.duration_us - 1))
        return errors

    def _at(self, amount: float, sms: int | None, quantity: str) -> float:
        shares = self.shares
        asked = shares[-1] if sms is None else min(sms, shares[-1])
        if asked < shares[0]:
            raise ProfileError(f"{self.operation}: {asked} SMs, it was measured on {shares[0]} and more")
        upper = bisect_left(shares, asked)
        at_upper = self._along(shares[upper], amount, quantity)
        if shares[upper] == asked:
            return at_upper
        low, high = shares[upper - 1], shares[upper]
        weight = (1 / asked - 1 / high) / (1 / low - 1 / high)
        return weight * self._along(low, amount, quantity) + (1 - weight) * at_upper

    def _along(self, sms: int, amount: float, quantity: str) -> float:
        curve = self._curves[sms]
        if len(curve) == 1:
            return float(getattr(curve[0], quantity)) * amount / curve[0].amount
        index = min(max(bisect_left([p.amount for p in curve], amount), 1), len(curve) - 1)
        a, b = curve[index - 1], curve[index]
        first, second = float(getattr(a, quantity)), float(getattr(b, quantity))
        return first + (second - first) * (amount - a.amount) / (b.amount - a.amount)


class HeldOut(NamedTuple):
    """Errors of the interpolation at points that it did not see, relative."""

    median: float
    worst: float
    worst_operation: str


def held_out(profile: Profile) -> HeldOut:
    """Raises: ProfileError, no operation has three amounts at one share."""
    errors = [(error, name) for name in profile.operations for error in profile.surface(name).held_out_errors()]
    if not errors:
        raise ProfileError("no operation was measured at three amounts: nothing can be held out")
    return HeldOut(median(error for error, _ in errors), *max(errors))
