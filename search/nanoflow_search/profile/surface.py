"""A surface gives an operation's time and energy between the points at which they were measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from msgspec.structs import replace

from nanoflow_search.profile.load import Point, ProfileError

SAME_CLOCK = 0.02  # relative: clocks that differ by less say nothing about how a time depends on them


class ClockLaw(NamedTuple):
    """The law by which a launch's time and dynamic energy follow the clock f, given both at a clock F.

    t(f) = t(F) (1 - time_share + time_share F / f) and e(f) = e(F) (1 - energy_share + energy_share f / F).
    """

    time_share: float  # the share of the time that is counted in SM cycles; the rest waits for memory
    energy_share: float  # the share of the energy that grows with the clock

    @classmethod
    def through(cls, at: Point, other: Point) -> ClockLaw:
        """Return the law through two points of one load at two clocks.

        Both shares are kept within 0 .. 1: a lower clock saves no time, stretches no more than cycles, costs no energy.
        """
        apart = other.clock_mhz / at.clock_mhz
        time_share = (other.duration_us / at.duration_us - 1) / (1 / apart - 1) if at.duration_us else 0.0
        energy_share = (other.dynamic_j / at.dynamic_j - 1) / (apart - 1) if at.dynamic_j else 0.0
        return cls(min(max(time_share, 0.0), 1.0), min(max(energy_share, 0.0), 1.0))


def at_clock(points: Sequence[Point], clock_mhz: float) -> list[Point]:
    """Return one operation's points as they would be at a clock: one for each amount and number of SMs.

    Between two clocks at which a point was measured, time is linear in 1 / f and energy is linear in f. Beyond them the
    point's own law holds; where a point has one clock only, the law of the nearest point that has two. An operation
    that has no point with two clocks keeps its time and energy.
    """
    groups: dict[tuple[int, float], list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.clock_mhz, -p.busy)):
        group = groups.setdefault((point.sms, point.amount), [])
        if not group or point.clock_mhz > group[-1].clock_mhz * (1 + SAME_CLOCK):
            group.append(point)
        elif point.busy == 1:  # a measurement without pauses is the more exact one
            group[-1] = point
    laws = [(group[0], ClockLaw.through(group[0], group[-1])) for group in groups.values() if len(group) > 1]

    def law_of(point: Point) -> ClockLaw:
        """Return the nearest law, on the same SMs first: a limit of SMs changes what a launch waits for."""
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
    """Time and energy of one operation over amount and SMs, at one clock.

    Over the amount it is piecewise linear. Beyond the largest amount it follows the line through the outermost two;
    below the least it is never less than in proportion, since a launch has a cost of its own. Over SMs it is linear in
    1 / SMs, as for work that divides evenly. Fewer SMs than were measured are refused.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.operation = points[0].operation
        self._curves: dict[int, list[Point]] = {}
        for point in sorted(points, key=lambda p: (p.sms, p.amount)):
            self._curves.setdefault(point.sms, []).append(point)

    @property
    def shares(self) -> tuple[int, ...]:
        """The numbers of SMs at which it was measured, ascending."""
        return tuple(self._curves)

    def duration_us(self, amount: float, sms: int | None = None) -> float:
        """Return the time of a launch on `sms` SMs (None: all).

        Raises:
            ProfileError: fewer SMs than it was measured on.
        """
        return self._at(amount, sms, "duration_us")

    def dynamic_j(self, amount: float, sms: int | None = None) -> float:
        """Return the energy of a launch beyond static power. Raises what `duration_us` raises."""
        return self._at(amount, sms, "dynamic_j")

    def held_out_errors(self) -> list[float]:
        """Return the relative error of the time at each inner point of a curve, interpolated without that point."""
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
        # Times grow in steps, one for each wave of tiles. Beyond the last point, the slope between the last two points
        # may be a step or the flat part between two steps; the slope over the whole curve is neither.
        a, b = (curve[index - 1], curve[index]) if index < len(curve) else (curve[0], curve[-1])
        first, second = float(getattr(a, quantity)), float(getattr(b, quantity))
        line = first + (second - first) * (amount - a.amount) / (b.amount - a.amount)
        # A step between the first two points would make a launch on fewer tokens cost nothing.
        return max(line, first * amount / a.amount) if amount < a.amount else line
