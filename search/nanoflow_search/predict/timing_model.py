"""Measured: what a profile says of the operations and tasks of a layer, for a batch of a certain mix, at one clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import prod
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Group
from nanoflow_search.cost.work import Mix
from nanoflow_search.plan.problem import NanoTask, Problem, Timeline
from nanoflow_search.plan.stage_two import Choice, Contention, Side
from nanoflow_search.predict.decode_layout import Decodes, dealt
from nanoflow_search.profile.data import Profile, Surface

Running = tuple[str, int | None]  # a curve, and the SMs that it runs on; None: all, shared
TURNS = 2.0  # what was never measured side by side is taken to run in turns


class Beside(NamedTuple):
    """What the first of two loads goes through while the second runs."""

    slowdown: float
    energy_ratio: float  # of both


@dataclass(frozen=True)
class Measured:
    """Of batches as the engine forms them: decodes come first, in each group if there are groups; then prompts."""

    profile: Profile
    mix: Mix
    clock_mhz: float | None = None  # None: the highest
    groups: tuple[Group, ...] = ()
    # By clock, for all that `at` and `of_groups` make: predictions of plans try the same clocks again and again.
    _surfaces_at: dict[float | None, dict[str, Surface]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def _decodes(self) -> Decodes:
        return dealt(self.mix, self.groups)

    @cached_property
    def _surfaces(self) -> dict[str, Surface]:
        if self.clock_mhz not in self._surfaces_at:
            self._surfaces_at[self.clock_mhz] = {
                name: self.profile.surface(name, self.clock_mhz) for name in self.profile.operations
            }
        return self._surfaces_at[self.clock_mhz]

    @cached_property
    def _beside(self) -> dict[tuple[str, str], dict[tuple[int | None, int | None], Beside]]:
        found: dict[tuple[str, str], dict[tuple[int | None, int | None], Beside]] = {}
        for pair in self.profile.pairs:
            for one, other, slowdown in (
                ((pair.first, pair.first_sms), (pair.second, pair.second_sms), pair.first_slowdown),
                ((pair.second, pair.second_sms), (pair.first, pair.first_sms), pair.second_slowdown),
            ):
                found.setdefault((one[0], other[0]), {})[one[1], other[1]] = Beside(slowdown, pair.energy_ratio)
        return found

    def at(self, clock_mhz: float) -> Measured:
        return replace(self, clock_mhz=clock_mhz)

    def of_groups(self, groups: tuple[Group, ...]) -> Measured:
        return replace(self, groups=groups)

    # operations

    def decodes(self, start: int, stop: int) -> float:
        """How many of these rows decode."""
        return self._decodes(start, stop)

    def loads(
        self, run: tuple[str, ...], start: int, stop: int, decodes: float | None = None
    ) -> list[tuple[str, float]]:
        """(curve, amount) of each operation; attention has one for the tokens that decode, one for those of prompts.

        `decodes`: how many decode, if not those of this batch.

        Raises:
            ProfileError: an operation that was not measured.
        """
        if start == stop:
            return []
        decodes = self.decodes(start, stop) if decodes is None else decodes
        phases = {
            "decode": decodes * self.mix.decode_context,
            "prefill": (stop - start - decodes) * self.mix.prefill_context,
        }
        loads: list[tuple[str, float]] = []
        for operation in run:
            parts = [(f"{operation}/{phase}", amount) for phase, amount in phases.items() if amount > 0]
            if any(name in self._surfaces for name, _ in parts):
                loads += parts
            else:
                loads.append((operation, stop - start))
        for name, _ in loads:
            if name not in self._surfaces:
                self.profile.surface(name)  # says what is missing
        return loads

    def duration_us(self, curve: str, amount: float, sms: int | None) -> float:
        return self._surfaces[curve].duration_us(amount, sms)

    def dynamic_j(self, curve: str, amount: float, sms: int | None) -> float:
        return self._surfaces[curve].dynamic_j(amount, sms)

    def slowdown(self, one: Running, other: Running) -> float:
        """Of a (curve, SMs) beside another: as measured, or with the nearest SMs that were.

        SMs of their own say nothing about those that are shared, nor the other way round.
        """
        found = self._nearest(one, other)
        return found.slowdown if found else TURNS

    def slowdowns(self, running: Sequence[Running]) -> tuple[float, ...]:
        """Of each of some (curve, SMs) that run side by side: what it loses to the others adds up."""
        return tuple(
            1 + sum(self.slowdown(one, other) - 1 for m, other in enumerate(running) if m != n)
            for n, one in enumerate(running)
        )

    def energy_ratio(self, running: Sequence[Running]) -> float:
        """Of the dynamic energy of what runs side by side to that of each alone."""
        found = [self._nearest(one, other) for one, other in combinations(running, 2)]
        return prod(beside.energy_ratio for beside in found if beside)

    def _nearest(self, one: Running, other: Running) -> Beside | None:
        shared = None in (one[1], other[1])
        measured = self._beside.get((one[0], other[0]), {})
        near = {sms: beside for sms, beside in measured.items() if (None in sms) == shared}
        if not near:
            return None
        whole = self.profile.header.device_sms

        def away(sms: tuple[int | None, int | None]) -> int:
            return abs((sms[0] or whole) - (one[1] or whole)) + abs((sms[1] or whole) - (other[1] or whole))

        return near[min(near, key=away)]

    # tasks

    def times(self, run: tuple[str, ...], start: int, stop: int) -> float:
        """Times of stage one: all of the device, nothing beside."""
        return sum(self.duration_us(curve, amount, None) for curve, amount in self.loads(run, start, stop))

    def choice(self, run: tuple[str, ...], start: int, stop: int, sms: int | None) -> Choice:
        loads = self.loads(run, start, stop)
        return Choice(
            sms,
            sum(self.duration_us(curve, amount, sms) for curve, amount in loads),
            sum(self.dynamic_j(curve, amount, sms) for curve, amount in loads),
        )

    def contention(
        self, problem: Problem, ordered: Timeline, chunk_tokens: int, partition: Mapping[str, int] | None = None
    ) -> Contention:
        """What stage two needs: shares that some pair was measured with, and all SMs; or those of a lane's partition.

        Beside another task, a task is slowed down as its operations were beside the other's, by the time each takes.
        """
        own = {task.name: (partition or {}).get(task.lane) for task in problem.tasks}
        task_of = {operation: task.name for task in problem.tasks for operation in task.operations}
        sides: dict[str, set[int | None]] = {name: {sms} for name, sms in own.items()}
        weighed: dict[tuple[Side, Side], list[tuple[float, float]]] = {}  # weight, slowdown
        for (one, other), by_sms in self._beside.items():
            first, second = (task_of.get(curve.partition("/")[0]) for curve in (one, other))
            if first is None or second is None or first == second:
                continue
            if partition:
                nearest = self._nearest((one, own[first]), (other, own[second]))
                by_sms = {(own[first], own[second]): nearest} if nearest else {}
            for (sms, other_sms), beside in by_sms.items():
                sides[first].add(sms)
                weight = self._weight(one, problem, chunk_tokens) * self._weight(other, problem, chunk_tokens)
                key = Side(first, sms), Side(second, other_sms)
                weighed.setdefault(key, []).append((weight, beside.slowdown))
        slowdown = {}
        for pair, parts in weighed.items():
            total = sum(weight for weight, _ in parts)
            slowdown[pair] = sum(w * s for w, s in parts) / total if total else max(s for _, s in parts)
        choices: dict[NanoTask, tuple[Choice, ...]] = {}
        for p in ordered.placed:
            tokens = (p.nano.start * chunk_tokens, p.nano.stop * chunk_tokens)
            shares = sorted(sides[p.nano.task], key=lambda sms: (sms is not None, sms or 0))
            choices[p.nano] = tuple(self.choice(problem[p.nano.task].operations, *tokens, sms) for sms in shares)
        header = self.profile.header
        return Contention(header.device_sms, choices, slowdown, header.power_cap_w, header.static_w)

    def _weight(self, curve: str, problem: Problem, chunk_tokens: int) -> float:
        """Its time alone, on the whole batch."""
        operation, _, phase = curve.partition("/")
        loads = self.loads((operation,), 0, problem.chunks * chunk_tokens)
        return sum(self.duration_us(name, amount, None) for name, amount in loads if not phase or name == curve)
