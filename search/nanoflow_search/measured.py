"""Measured: what a profile says about the tasks of a layer, for a batch of a certain mix, at one clock limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from nanoflow_search.problem import NanoTask, Problem, Timeline
from nanoflow_search.profile import Profile, Surface
from nanoflow_search.stage_two import Choice, Contention, Side
from nanoflow_search.work import Mix


@dataclass(frozen=True)
class Measured:
    """Of batches whose first tokens decode and whose others are of prompts, as the engine forms them."""

    profile: Profile
    mix: Mix
    limit_mhz: float | None = None  # None: the highest

    @cached_property
    def _surfaces(self) -> dict[str, Surface]:
        return {name: self.profile.surface(name, self.limit_mhz) for name in self.profile.operations}

    def times(self, run: tuple[str, ...], start: int, stop: int) -> float:
        """Times of stage one: all of the device, nothing beside."""
        return sum(self._surfaces[name].duration_us(amount) for name, amount in self._loads(run, start, stop))

    def choice(self, run: tuple[str, ...], start: int, stop: int, sms: int | None) -> Choice:
        loads = [(self._surfaces[name], amount) for name, amount in self._loads(run, start, stop)]
        return Choice(
            sms,
            sum(surface.duration_us(amount, sms) for surface, amount in loads),
            sum(surface.dynamic_j(amount, sms) for surface, amount in loads),
        )

    def contention(self, problem: Problem, ordered: Timeline, chunk_tokens: int) -> Contention:
        """What stage two needs: shares that some pair was measured with, and all SMs."""
        sides: dict[str, set[int | None]] = {task.name: {None} for task in problem.tasks}
        slowdown: dict[tuple[Side, Side], float] = {}
        for pair in self.profile.pairs:
            first = Side(_task_of(pair.first), pair.first_sms)
            second = Side(_task_of(pair.second), pair.second_sms)
            if first.task in sides and second.task in sides:
                sides[first.task].add(first.sms)
                sides[second.task].add(second.sms)
                slowdown[first, second], slowdown[second, first] = pair.first_slowdown, pair.second_slowdown
        choices: dict[NanoTask, tuple[Choice, ...]] = {}
        for p in ordered.placed:
            tokens = (p.nano.start * chunk_tokens, p.nano.stop * chunk_tokens)
            shares = sorted(sides[p.nano.task], key=lambda sms: (sms is not None, sms or 0))
            choices[p.nano] = tuple(self.choice(problem[p.nano.task].operations, *tokens, sms) for sms in shares)
        header = self.profile.header
        return Contention(header.device_sms, choices, slowdown, header.power_cap_w, header.static_w)

    def at(self, limit_mhz: float) -> Measured:
        return replace(self, limit_mhz=limit_mhz)

    def _loads(self, run: tuple[str, ...], start: int, stop: int) -> list[tuple[str, float]]:
        """(curve, amount) of each operation; attention has one for the tokens that decode, one for those of prompts."""
        decodes = max(0.0, min(stop, self.mix.decode_tokens) - start)
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
        return [(name, amount) for name, amount in loads if self._known(name)]

    def _known(self, name: str) -> bool:
        return bool(self._surfaces.get(name) or self.profile.surface(name, self.limit_mhz))


def _task_of(curve: str) -> str:
    return curve.partition("/")[0]
