"""anneal: a plan of the two programs, changed at random where the fluid simulation says that it gets shorter.

The programs take a loss as if it lasted all the time, and cut tasks alike. Neither holds here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Launch, Schedule, Wait
from nanoflow_search.measured import Measured
from nanoflow_search.problem import NanoTask, Placed, Problem, Timeline
from nanoflow_search.stage_two import Shares, needs
from nanoflow_search.walk import Pace, Phase, Walked, walk

LAYERS, SETTLED = 6, 2  # that are simulated; those at either end are not part of the steady state
HOT, COLD = 0.005, 0.0002  # of the period: what a worse plan may cost, at first and at last
FARTHEST = 2  # chunks that a boundary moves at once
AHEAD = 1  # layers that a nano-task may run ahead


class Piece(NamedTuple):
    nano: NanoTask
    layers_ahead: int
    sms: int | None


Pieces = tuple[Piece, ...]  # in order of issue, that of their lanes too


def pieces_of(shares: Shares, finer: int = 1) -> Pieces:
    """Those of a plan, for a problem with `finer` chunks in place of one."""
    return tuple(
        Piece(NanoTask(p.nano.task, p.nano.start * finer, p.nano.stop * finer), p.layers_ahead, shares.sms[p.nano])
        for p in sorted(shares.timeline.placed, key=lambda p: (round(p.start_us, 3), p.nano.start))
    )


def anneal(
    problem: Problem,
    measured: Measured,
    pieces: Pieces,
    sms: Mapping[str, Sequence[int | None]],
    chunk_tokens: int,
    *,
    steps: int,
    seed: int = 0,
) -> Shares:
    """The best plan on a random path of `steps` changes from `pieces`. `sms`: the shares that a task may have.

    Raises:
        ValueError: `pieces` wait for each other.
    """
    fluid = Fluid(problem, measured, chunk_tokens)
    rng = random.Random(seed)
    best = here = pieces
    best_us = here_us = fluid.period_us(pieces)
    if best_us == math.inf:
        raise ValueError("pieces: expected a plan whose nano-tasks follow what they read")
    for step in range(steps):
        heat_us = best_us * HOT * (COLD / HOT) ** (step / steps)
        changed = _changed(here, problem, sms, rng)
        if changed is None or changed == here:
            continue
        changed_us = fluid.period_us(changed)
        if changed_us < here_us or rng.random() < math.exp((here_us - changed_us) / heat_us):
            here, here_us = changed, changed_us
            if here_us < best_us:
                best, best_us = here, here_us
    return fluid.shares(best)


class Fluid:
    """The fluid simulation of plans of one problem (`predict`), in the steady state."""

    def __init__(self, problem: Problem, measured: Measured, chunk_tokens: int) -> None:
        self._problem, self._measured, self._chunk_tokens = problem, measured, chunk_tokens
        self._lanes = {task.name: task.lane for task in problem.tasks}
        self._operations = {task.name: task.operations for task in problem.tasks}
        self._phases: dict[tuple[NanoTask, int | None], list[Phase]] = {}
        self._paces: dict[tuple[tuple[str, int | None], ...], Pace] = {}

    def period_us(self, pieces: Pieces) -> float:
        """Infinite, if they wait for each other."""
        schedule = self._schedule(pieces)
        return math.inf if schedule is None else self._period_us(schedule, self._walk(schedule, pieces))

    def shares(self, pieces: Pieces) -> Shares:
        """With the timeline of a period in the middle."""
        schedule = self._schedule(pieces)
        assert schedule is not None
        walked = self._walk(schedule, pieces)
        span_us = dict(zip(schedule.unroll(LAYERS), walked.spans_us, strict=True))
        starts = [span_us[SETTLED + 1 + p.layers_ahead, n] for n, p in enumerate(pieces)]
        first_us = min(begin for begin, _ in starts)
        placed = [
            Placed(p.nano, begin - first_us, end - begin, p.layers_ahead)
            for p, (begin, end) in zip(pieces, starts, strict=True)
        ]
        by_start = tuple(sorted(placed, key=lambda p: p.start_us))
        timeline = Timeline(self._period_us(schedule, walked), by_start, gap=math.inf)  # nothing is proven
        return Shares(timeline, {p.nano: p.sms for p in pieces}, walked.dynamic_j / LAYERS)

    def _schedule(self, pieces: Pieces) -> Schedule | None:
        """A launch for each piece, and what it waits for; None, if that is issued after it."""
        timeline = Timeline(0.0, tuple(Placed(p.nano, 0.0, 0.0, p.layers_ahead) for p in pieces))
        number = {p.nano: n for n, p in enumerate(pieces)}
        waits: list[list[Wait]] = [[] for _ in pieces]
        for writer, reader, periods in needs(self._problem, timeline):
            i, j = number[writer], number[reader]
            if periods < 0 or (periods == 0 and i > j):
                return None
            waits[j].append(Wait(i, periods - pieces[i].layers_ahead + pieces[j].layers_ahead))
        launches = tuple(
            Launch(
                operation=p.nano.task,
                start=p.nano.start,
                stop=p.nano.stop,
                lane=self._lanes[p.nano.task],
                layers_ahead=p.layers_ahead,
                waits=tuple(waits[n]),
            )
            for n, p in enumerate(pieces)
        )
        return Schedule(tokens=self._problem.chunks, launches=launches)

    def _walk(self, schedule: Schedule, pieces: Pieces) -> Walked:
        return walk(schedule, LAYERS, [self._phases_of(p.nano, p.sms) for p in pieces], self._pace)

    def _period_us(self, schedule: Schedule, walked: Walked) -> float:
        begin_us = end_us = 0.0
        for (layer, _), (_, ended_us) in zip(schedule.unroll(LAYERS), walked.spans_us, strict=True):
            if layer == SETTLED:
                begin_us = max(begin_us, ended_us)
            elif layer == LAYERS - SETTLED:
                end_us = max(end_us, ended_us)
        return (end_us - begin_us) / (LAYERS - 2 * SETTLED)

    def _phases_of(self, nano: NanoTask, sms: int | None) -> list[Phase]:
        if (nano, sms) not in self._phases:
            tokens = (nano.start * self._chunk_tokens, nano.stop * self._chunk_tokens)
            self._phases[nano, sms] = [
                Phase(curve, amount, sms, alone_us)
                for curve, amount in self._measured.loads(self._operations[nano.task], *tokens)
                if (alone_us := self._measured.duration_us(curve, amount, sms)) > 0
            ]
        return self._phases[nano, sms]

    def _pace(self, running: tuple[Phase, ...]) -> Pace:
        sides = tuple((phase.curve, phase.sms) for phase in running)
        if sides not in self._paces:
            self._paces[sides] = Pace(self._measured.slowdowns(sides), 0.0)
        return self._paces[sides]


def _changed(
    pieces: Pieces, problem: Problem, sms: Mapping[str, Sequence[int | None]], rng: random.Random
) -> Pieces | None:
    """One change at random; None, if this plan has no such change."""
    n = rng.randrange(len(pieces))
    piece, others = pieces[n], [*pieces[:n], *pieces[n + 1 :]]
    task, start, stop = piece.nano
    match rng.choices(("order", "layer", "share", "boundary", "join", "split"), (3, 1, 3, 2, 1, 1))[0]:
        case "order":
            others.insert(rng.randrange(len(pieces)), piece)
            return tuple(others)
        case "layer":
            others.insert(rng.randrange(len(pieces)), piece._replace(layers_ahead=AHEAD - piece.layers_ahead))
            return tuple(others)
        case "share":
            return (*pieces[:n], piece._replace(sms=rng.choice(sms[task])), *pieces[n + 1 :])
        case "boundary":
            to = stop + rng.choice((-1, 1)) * rng.randint(1, FARTHEST)
            return _with_boundary(pieces, stop, to, task if rng.random() < 0.5 else None, problem.chunks)
        case "join":
            after = [p for p in others if p.nano.task == task and p.nano.start == stop]
            joined = piece._replace(nano=NanoTask(task, start, after[0].nano.stop)) if after else piece
            return tuple(joined if p is piece else p for p in pieces if p not in after)
        case "split":
            if stop - start < 2:
                return None
            at = rng.randrange(start + 1, stop)
            halves = (piece._replace(nano=NanoTask(task, *r)) for r in ((start, at), (at, stop)))
            return (*pieces[:n], *halves, *pieces[n + 1 :])
    raise AssertionError


def _with_boundary(pieces: Pieces, boundary: int, to: int, only: str | None, chunks: int) -> Pieces | None:
    """With a boundary elsewhere, of one task or of all that are cut there."""
    if boundary == chunks:
        return None
    found = []
    for p in pieces:
        task, start, stop = p.nano
        if only in (None, task):
            start, stop = (to if edge == boundary else edge for edge in (start, stop))
        if not 0 <= start < stop <= chunks:
            return None
        found.append(p._replace(nano=NanoTask(task, start, stop)))
    return tuple(found)
