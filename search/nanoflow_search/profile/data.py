"""Profile: what was measured of a model's operations on a machine, and what follows from it between the points.

An operation's *amount* is what its time grows with: tokens; for decode attention the keys that it reads, for prefill
attention the pairs of query and key.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

import msgspec
from msgspec.structs import replace

from nanoflow_backend.config.precision import Precision

FORMAT_VERSION = 3  # 3: precision
APART = 0.02  # clocks that differ by less say nothing about how a time depends on them


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
    power_w: float  # of the whole device while they run
    clock_mhz: float  # that the power left


class Device(Protocol):
    """What can be profiled: a GPU, or a law that stands for one. Its clock cannot be set, it follows power."""

    @property
    def name(self) -> str: ...

    @property
    def sms(self) -> int: ...

    @property
    def static_w(self) -> float:
        """Drawn by SMs that are awake and do nothing useful."""
        ...

    @property
    def power_cap_w(self) -> float: ...

    @property
    def highest_clock_mhz(self) -> float: ...

    def time(self, loads: Sequence[Load], busy: float = 1.0, heated: bool = False) -> Measurement:
        """Run `loads` side by side until times, power and clock stand still.

        A single load may work for just a share `busy` of the time, in bursts. If the device is idle for the rest, the
        cap leaves it a higher clock; if that is `heated` by work of the most power, a lower one.

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
    busy: float = 1.0  # see Device.time
    heated: bool = False


class Pair(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Two loads that ran side by side: how much longer each took than alone, with the same SMs at the same clock."""

    first: str
    first_sms: int | None  # a cap: it is launched beside the other as the engine launches it; None: no cap
    second: str
    second_sms: int | None
    first_slowdown: float
    second_slowdown: float
    power_w: float
    clock_mhz: float
    energy_ratio: float = 1.0  # the dynamic energy of both, over what they take alone


class Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    format_version: int = FORMAT_VERSION
    model_fingerprint: str
    precision: Precision
    device: str
    device_sms: int
    tensor_parallel: int
    static_w: float
    power_cap_w: float


class _Version(msgspec.Struct):
    format_version: int


class _Versioned(msgspec.Struct):
    header: _Version


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Points of every operation alone, over amount, SMs and clock; and of pairs, on both sides."""

    header: Header
    points: tuple[Point, ...] = ()
    pairs: tuple[Pair, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Raises: ProfileError, naming the file and the place in it."""
        try:
            content = path.read_bytes()
            version = msgspec.json.decode(content, type=_Versioned).header.format_version
            if version != FORMAT_VERSION:  # before keys that another version may have
                raise ProfileError(f"{path}: format version {version}, expected {FORMAT_VERSION}: measure it anew")
            return msgspec.json.decode(content, type=cls)
        except OSError as error:
            raise ProfileError(f"{path}: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ProfileError(f"{path}: {error}") from None

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
    def clocks_mhz(self) -> tuple[float, ...]:
        """Levels to plan at: the lowest and the highest clock that was measured, and the middle."""
        measured = [point.clock_mhz for point in self.points]
        low, high = min(measured, default=0.0), max(measured, default=0.0)
        return (low, (low + high) / 2, high) if high - low > APART * high else (high,)

    def surface(self, operation: str, clock_mhz: float | None = None) -> Surface:
        """Of one operation at a clock; None: the highest. Raises: ProfileError, it was not measured."""
        points = [p for p in self.points if p.operation == operation]
        if not points:
            raise ProfileError(f"{operation} was not measured; there are {', '.join(self.operations)}")
        return Surface(at_clock(points, clock_mhz or max(self.clocks_mhz)))

    def resource_to_performance(self, operation: str, amount: float) -> dict[float, float]:
        """The paper's table: the share of the SMs, R -> the performance that it leaves of the best alone, P."""
        surface = self.surface(operation)
        best = min(surface.duration_us(amount, sms) for sms in surface.shares)
        return {sms / self.header.device_sms: best / surface.duration_us(amount, sms) for sms in surface.shares}


class ClockLaw(NamedTuple):
    """How a launch's time and dynamic energy follow the clock f, seen from a clock F at which they are known:
    t(f) = t(F) (1 - time_share + time_share F / f), e(f) = e(F) (1 - energy_share + energy_share f / F)."""

    time_share: float  # of cycles; the rest waits for memory
    energy_share: float

    @classmethod
    def through(cls, at: Point, other: Point) -> ClockLaw:
        """Between 0 and 1: a lower clock neither saves time nor costs more than its cycles, nor does it cost energy."""
        apart = other.clock_mhz / at.clock_mhz
        time_share = (other.duration_us / at.duration_us - 1) / (1 / apart - 1) if at.duration_us else 0.0
        energy_share = (other.dynamic_j / at.dynamic_j - 1) / (apart - 1) if at.dynamic_j else 0.0
        return cls(min(max(time_share, 0.0), 1.0), min(max(energy_share, 0.0), 1.0))


def at_clock(points: Sequence[Point], clock_mhz: float) -> list[Point]:
    """One operation's points as they would be at a clock, one for each amount and SMs.

    Linear in 1 / f (time) and in f (energy) between two clocks at which a point was measured; beyond them, and where
    there is but one, by the law of the nearest amount that has two. An operation without two clocks anywhere keeps its
    time and energy.
    """
    groups: dict[tuple[int, float], list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.clock_mhz, -p.busy)):
        group = groups.setdefault((point.sms, point.amount), [])
        if not group or point.clock_mhz > group[-1].clock_mhz * (1 + APART):
            group.append(point)
        elif point.busy == 1:  # all of its time was measured
            group[-1] = point
    laws = [(group[0], ClockLaw.through(group[0], group[-1])) for group in groups.values() if len(group) > 1]

    def law_of(point: Point) -> ClockLaw:
        """Of the same SMs rather than of the same amount: a cap changes what a launch waits for."""
        if not laws:
            return ClockLaw(0.0, 0.0)
        return min(laws, key=lambda law: (law[0].sms != point.sms, abs(math.log(law[0].amount / point.amount))))[1]

    found = []
    for group in groups.values():
        above = bisect_left([p.clock_mhz for p in group], clock_mhz)
        if 0 < above < len(group):
            low, high = group[above - 1], group[above]
            slow = (1 / clock_mhz - 1 / high.clock_mhz) / (1 / low.clock_mhz - 1 / high.clock_mhz)
            fast = (clock_mhz - low.clock_mhz) / (high.clock_mhz - low.clock_mhz)
            us = slow * low.duration_us + (1 - slow) * high.duration_us
            joules = (1 - fast) * low.dynamic_j + fast * high.dynamic_j
            known = low
        else:
            known, other = (group[0], group[-1]) if above == 0 else (group[-1], group[0])
            law = ClockLaw.through(known, other) if len(group) > 1 else law_of(known)
            us = known.duration_us * (1 + law.time_share * (known.clock_mhz / clock_mhz - 1))
            joules = known.dynamic_j * (1 + law.energy_share * (clock_mhz / known.clock_mhz - 1))
        found.append(replace(known, duration_us=us, dynamic_j=joules, clock_mhz=clock_mhz))
    return found


class Surface:
    """Time and energy of an operation over amount and SMs, at one clock.

    Linear in the amount between its points, and on from the outermost two, but below the least never less than in
    proportion: a launch costs something. Over SMs linear in 1 / SMs, which is what work that divides evenly follows. A
    share below the least measured is refused: nothing is known there.
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
        index = max(bisect_left([p.amount for p in curve], amount), 1)
        # Times go in steps of waves: beyond the last point the last step, or what lies between two, says little.
        a, b = (curve[index - 1], curve[index]) if index < len(curve) else (curve[0], curve[-1])
        first, second = float(getattr(a, quantity)), float(getattr(b, quantity))
        line = first + (second - first) * (amount - a.amount) / (b.amount - a.amount)
        # A step at the least points would make a launch on fewer tokens cost nothing.
        return max(line, first * amount / a.amount) if amount < a.amount else line


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
