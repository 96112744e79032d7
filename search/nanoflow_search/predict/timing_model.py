"""The timing model says what operations take, alone and side by side: a profile read for one mix at one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import prod
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Group
from nanoflow_search.cost.workload import Mix
from nanoflow_search.predict.decode_layout import DecodeCount, count_decodes
from nanoflow_search.profile.data import Profile
from nanoflow_search.profile.surface import Surface

RunningCurve = tuple[str, int | None]  # a curve of the profile and the SMs that it runs on; None: all of them, shared
SmsPair = tuple[int | None, int | None]
UNMEASURED_SLOWDOWN = 2.0  # two operations that were never measured side by side are taken to run in turns


class PairEffect(NamedTuple):
    """What the first of two loads suffers while the second runs beside it."""

    slowdown: float  # time beside the other over time alone
    energy_ratio: float  # dynamic energy of both side by side over the sum of each alone


@dataclass(frozen=True)
class TimingModel:
    """The times and energies of operations on ranges of a batch's rows.

    Rows are laid out as the engine does it: decodes first, in each group if there are groups; then prompts.
    """

    profile: Profile
    mix: Mix
    clock_mhz: float | None = None  # None: the highest that was measured
    groups: tuple[Group, ...] = ()
    # Shared by all models that `at` and `with_groups` make: predictions of plans try the same clocks again and again.
    _surfaces_at: dict[float | None, dict[str, Surface]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _decodes(self) -> DecodeCount:
        return count_decodes(self.mix, self.groups)

    @cached_property
    def _surfaces(self) -> dict[str, Surface]:
        if self.clock_mhz not in self._surfaces_at:
            self._surfaces_at[self.clock_mhz] = {
                name: self.profile.surface(name, self.clock_mhz) for name in self.profile.operations
            }
        return self._surfaces_at[self.clock_mhz]

    @cached_property
    def pair_effects(self) -> Mapping[tuple[str, str], Mapping[SmsPair, PairEffect]]:
        """Every pair that was measured, in both orders: (curve, other curve) -> (SMs, other's SMs) -> effect."""
        found: dict[tuple[str, str], dict[SmsPair, PairEffect]] = {}
        for pair in self.profile.pairs:
            for one, other, slowdown in (
                ((pair.first, pair.first_sms), (pair.second, pair.second_sms), pair.first_slowdown),
                ((pair.second, pair.second_sms), (pair.first, pair.first_sms), pair.second_slowdown),
            ):
                found.setdefault((one[0], other[0]), {})[one[1], other[1]] = PairEffect(slowdown, pair.energy_ratio)
        return found

    def at(self, clock_mhz: float) -> TimingModel:
        """Return the same model at another clock."""
        return replace(self, clock_mhz=clock_mhz)

    def with_groups(self, groups: tuple[Group, ...]) -> TimingModel:
        """Return the same model for batches whose decodes are dealt out to `groups`."""
        return replace(self, groups=groups)

    def decodes(self, start: int, stop: int) -> float:
        """Return how many of the rows start .. stop - 1 decode."""
        return self._decodes(start, stop)

    def loads(
        self, operations: tuple[str, ...], start: int, stop: int, decodes: float | None = None
    ) -> list[tuple[str, float]]:
        """Return (curve, amount) of each operation on the rows start .. stop - 1.

        Attention has one curve for tokens that decode and one for those of prompts. `decodes` says how many of the rows
        decode, if not as many as in this batch.

        Raises:
            ProfileError: an operation was not measured.
        """
        if start == stop:
            return []
        decodes = self.decodes(start, stop) if decodes is None else decodes
        phases = {
            "decode": decodes * self.mix.decode_context,
            "prefill": (stop - start - decodes) * self.mix.prefill_context,
        }
        loads: list[tuple[str, float]] = []
        for operation in operations:
            parts = [(f"{operation}/{phase}", amount) for phase, amount in phases.items() if amount > 0]
            if any(name in self._surfaces for name, _ in parts):
                loads += parts
            else:
                loads.append((operation, stop - start))
        for name, _ in loads:
            if name not in self._surfaces:
                self.profile.surface(name)  # raises, and says what is missing
        return loads

    def duration_us(self, curve: str, amount: float, sms: int | None) -> float:
        """Return the time of one launch alone on `sms` SMs (None: all)."""
        return self._surfaces[curve].duration_us(amount, sms)

    def dynamic_j(self, curve: str, amount: float, sms: int | None) -> float:
        """Return the energy of one launch alone on `sms` SMs (None: all), beyond static power."""
        return self._surfaces[curve].dynamic_j(amount, sms)

    def operations_us(self, operations: tuple[str, ...], start: int, stop: int, sms: int | None = None) -> float:
        """Return the time of operations one after the other on the rows start .. stop - 1, with nothing beside them."""
        return sum(self.duration_us(curve, amount, sms) for curve, amount in self.loads(operations, start, stop))

    def operations_j(self, operations: tuple[str, ...], start: int, stop: int, sms: int | None = None) -> float:
        """Return the dynamic energy of operations one after the other on the rows start .. stop - 1."""
        return sum(self.dynamic_j(curve, amount, sms) for curve, amount in self.loads(operations, start, stop))

    def slowdown(self, one: RunningCurve, other: RunningCurve) -> float:
        """Return how much longer `one` takes beside `other`: as measured, or as with the nearest SMs that were.

        Partitioned and shared measurements are never substituted for each other.
        """
        found = self.nearest_effect(one, other)
        return found.slowdown if found else UNMEASURED_SLOWDOWN

    def slowdowns(self, running: Sequence[RunningCurve]) -> tuple[float, ...]:
        """Return how much longer each of several curves takes side by side: losses to the others add up."""
        return tuple(
            1 + sum(self.slowdown(one, other) - 1 for m, other in enumerate(running) if m != n)
            for n, one in enumerate(running)
        )

    def energy_ratio(self, running: Sequence[RunningCurve]) -> float:
        """Return the dynamic energy of curves side by side over the sum of each alone."""
        found = [self.nearest_effect(one, other) for one, other in combinations(running, 2)]
        return prod(effect.energy_ratio for effect in found if effect)

    def nearest_effect(self, one: RunningCurve, other: RunningCurve) -> PairEffect | None:
        """Return the effect of `other` on `one` with the nearest SMs that were measured; None: no such pair was.

        Only a pair of partitions stands for partitions, and only a pair that shares SMs for lanes that share them.
        """
        shared = None in (one[1], other[1])
        measured = self.pair_effects.get((one[0], other[0]), {})
        near = {sms: effect for sms, effect in measured.items() if (None in sms) == shared}
        if not near:
            return None
        whole = self.profile.header.device_sms

        def distance(sms: SmsPair) -> int:
            return abs((sms[0] or whole) - (one[1] or whole)) + abs((sms[1] or whole) - (other[1] or whole))

        return near[min(near, key=distance)]
