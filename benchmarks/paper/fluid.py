"""The fluid simulation says how long a period of pieces takes in the steady state, and which plan they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem
from nanoflow_search.plan.stage_two import ShareAssignment, nano_dependencies
from nanoflow_search.predict.simulate import NOTHING_US
from nanoflow_search.predict.timing_model import RunningCurve, TimingModel

from benchmarks.paper.piece import Piece, Pieces, attention_of
from benchmarks.paper.steady_period import Cycle, Stint, settled
from nanoflow_backend.schedule.plan import Group


class Paces(dict[tuple[RunningCurve | None, ...], Sequence[float]]):
    """Maps what runs in each lane to how much longer each takes; each is looked up in the profile once."""

    def __init__(self, measured: TimingModel) -> None:
        self._measured = measured

    def __missing__(self, running: tuple[RunningCurve | None, ...]) -> Sequence[float]:
        slower = iter(self._measured.slowdowns([one for one in running if one]))
        self[running] = [next(slower) if one else 1.0 for one in running]
        return self[running]


class Fluid:
    """Simulates plans of one problem, on chunks of so many tokens."""

    def __init__(self, problem: Problem, measured: TimingModel, chunk_tokens: int) -> None:
        self._problem, self._measured, self._chunk_tokens = problem, measured, chunk_tokens
        self._attention = attention_of(problem)
        self._lane = {task.name: problem.lanes.index(task.lane) for task in problem.tasks}
        self._phases: dict[tuple[NanoTask, int | None, int], tuple[tuple[RunningCurve, float], ...]] = {}
        self._paces = Paces(measured)

    def pieces(self, shares: ShareAssignment, finer: int = 1) -> Pieces:
        """Return the pieces of a plan, one of whose chunks is `finer` chunks here."""
        decodes = self._measured.with_groups(shares.groups).decodes
        found = []
        for p in sorted(shares.timeline.placed, key=lambda p: (round(p.start_us, 3), p.nano.start)):
            nano = NanoTask(p.nano.task, p.nano.start * finer, p.nano.stop * finer)
            first, last = (round(decodes(0, edge * self._chunk_tokens)) for edge in nano[1:])
            some = last - first if nano.task == self._attention else 0
            found.append(Piece(nano, p.layers_ahead, shares.sms[p.nano], some))
        return tuple(found)

    def period_us(self, pieces: Pieces) -> float:
        """Return the steady period; infinite, if pieces wait for each other or no period settles."""
        cycle = self._cycle(pieces)
        return cycle.period_us if cycle else math.inf

    def shares(self, pieces: Pieces) -> ShareAssignment:
        """Return the plan with the timeline of a period."""
        cycle = self._cycle(pieces)
        assert cycle is not None
        first_us = min(begin for begin, _ in cycle.spans_us)
        placed = [
            PlacedTask(p.nano, begin - first_us, end - begin, p.layers_ahead)
            for p, (begin, end) in zip(pieces, cycle.spans_us, strict=True)
        ]
        by_start = tuple(sorted(placed, key=lambda p: p.start_us))
        timeline = CyclicTimeline(cycle.period_us, by_start, gap=math.inf)  # nothing is proven
        return ShareAssignment(timeline, {p.nano: p.sms for p in pieces}, 0.0, self._groups(pieces))

    def _cycle(self, pieces: Pieces) -> Cycle | None:
        number = {p.nano: n for n, p in enumerate(pieces)}
        waits: list[list[tuple[int, int]]] = [[] for _ in pieces]
        for writer, reader, periods in nano_dependencies(self._problem, {p.nano: p.layers_ahead for p in pieces}):
            if periods < 0:
                return None
            waits[number[reader]].append((number[writer], periods))
        stints = [
            Stint(self._lane[p.nano.task], self._phases_of(p), waiting)
            for p, waiting in zip(pieces, waits, strict=True)
        ]
        return settled(stints, self._paces)

    def _phases_of(self, piece: Piece) -> tuple[tuple[RunningCurve, float], ...]:
        nano, sms, decodes = piece.nano, piece.sms, piece.decodes
        if (nano, sms, decodes) not in self._phases:
            rows = (nano.start * self._chunk_tokens, nano.stop * self._chunk_tokens)
            loads = self._measured.loads(self._problem[nano.task].operations, *rows, decodes)
            timed = [((curve, sms), self._measured.duration_us(curve, amount, sms)) for curve, amount in loads]
            some = tuple((one, alone_us) for one, alone_us in timed if alone_us > 0)
            self._phases[nano, sms, decodes] = some or ((timed[0][0], NOTHING_US),)
        return self._phases[nano, sms, decodes]

    def _groups(self, pieces: Pieces) -> tuple[Group, ...]:
        """Return the groups of rows: each piece of attention has its own."""
        found = sorted((p.nano.stop, p.decodes) for p in pieces if p.nano.task == self._attention)
        total = sum(decodes for _, decodes in found)
        return tuple(Group(stop * self._chunk_tokens, decodes / total) for stop, decodes in found if total)
