"""Stage two: the SMs of each nano-operation, under two-sided interference and the power cap (paper section 4.1.3).

The program, its symbols and the numbers of its constraints are those of search/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import NamedTuple

from nanoflow_backend.schedule.plan import Group
from nanoflow_search.plan.milp import Program, total
from nanoflow_search.plan.problem import NanoTask, Placed, Problem, Timeline


class Choice(NamedTuple):
    """A share of the device, and what the nano-task takes with it when nothing else runs."""

    sms: int | None  # a cap, its own among launches that all have one; None: all SMs, shared with what runs beside it
    duration_us: float
    dynamic_j: float = 0.0


class Side(NamedTuple):
    """A task under a share."""

    task: str
    sms: int | None


@dataclass(frozen=True)
class Contention:
    """What stage two knows of the device, at one clock level.

    slowdown[a, b] is how much longer a takes while b runs beside it; pairs that are not there must not overlap.
    """

    device_sms: int
    choices: Mapping[NanoTask, tuple[Choice, ...]]
    slowdown: Mapping[tuple[Side, Side], float]
    power_cap_w: float = math.inf
    static_w: float = 0.0


@dataclass(frozen=True)
class Shares:
    """A timeline under interference, and the SMs that each nano-task owns in it."""

    timeline: Timeline
    sms: Mapping[NanoTask, int | None]
    dynamic_j: float
    groups: tuple[Group, ...] = ()  # of tokens; how decodes are dealt out, if not all come first


def stage_two(
    problem: Problem,
    ordered: Timeline,
    contention: Contention,
    *,
    period_limit_us: float | None = None,
    time_limit_s: float = math.inf,
    gap: float = 1e-6,
) -> Shares:
    """The shortest period with the nano-tasks, the orders of lanes and the layers of stage one.

    `period_limit_us`: only plans that are not longer; by default the fastest shares, one after the other, in power.

    Raises:
        Infeasible: no plan keeps the limit; names the constraints.
        OutOfTime: none was found in time.
    """
    program = Program()

    # Sets
    N = [p.nano for p in ordered.placed]  # by start, so a lane's are in its order
    S = {i: contention.choices[i] for i in N}
    lane = {i: problem[i.task].lane for i in N}
    order = {name: [i for i in N if lane[i] == name] for name in problem.lanes}
    h = {p.nano: p.layers_ahead for p in ordered.placed}
    E = needs(problem, h)
    free = _unrelated([(i, j) for i, j in combinations(N, 2) if lane[i] != lane[j]], E, order.values())

    # Parameters
    sigma = contention.slowdown
    spare_w = contention.power_cap_w - contention.static_w
    alone = [min(S[i], key=lambda choice: choice.duration_us) for i in N]
    serial_us = max(sum(s.duration_us for s in alone), 1e6 * sum(s.dynamic_j for s in alone) / spare_w)
    M = period_limit_us if period_limit_us is not None else serial_us

    # Variables
    T = program.real(upper=M)
    t = {i: program.real() for i in N}
    u = {i: [program.binary() for _ in S[i]] for i in N}
    o = {pair: program.binary() for pair in free}
    y = {pair: program.binary() for pair in free}
    L = {(i, name): program.real() for i in N for name in order if name != lane[i]}

    # Expressions
    d = {
        i: total(s.duration_us * u[i][k] for k, s in enumerate(S[i])) + total(L[i, n] for n in order if n != lane[i])
        for i in N
    }
    dynamic_j = total(s.dynamic_j * u[i][k] for i in N for k, s in enumerate(S[i]))

    for i in N:
        program.subject_to(f"(1) {name(i)} has one share", total(u[i]).equals(1))
        program.subject_to("(2) starts are in the period", t[i] <= T)

    for i, j, periods in E:
        program.subject_to(f"(3) {name(j)} after {name(i)}", t[j] + float(periods) * T >= t[i] + d[i])

    for members in order.values():
        for i, j in pairwise(members):
            program.subject_to("(4) lanes keep their order", t[j] >= t[i] + d[i])
        if members:
            program.subject_to(
                "(5) a lane ends before its next period", t[members[0]] + T >= t[members[-1]] + d[members[-1]]
            )

    for i, j in free:
        bound = 2 * M
        program.subject_to("(6) apart, unless they overlap", t[j] >= t[i] + d[i] - bound * (1 - y[i, j] + o[i, j]))
        program.subject_to("(6) apart, unless they overlap", t[i] + T >= t[j] + d[j] - bound * (1 - y[i, j] + o[i, j]))
        program.subject_to("(7) apart, unless they overlap", t[i] >= t[j] + d[j] - bound * (y[i, j] + o[i, j]))
        program.subject_to("(7) apart, unless they overlap", t[j] + T >= t[i] + d[i] - bound * (y[i, j] + o[i, j]))

    for pair in free:
        for i, j in (pair, pair[::-1]):
            for k, s in enumerate(S[i]):
                me = Side(i.task, s.sms)
                beside = [(Side(j.task, other.sms), u[j][m]) for m, other in enumerate(S[j])]
                program.subject_to(
                    "(8) what overlaps may run beside each other",
                    u[i][k] + o[pair] + total(v for side, v in beside if (me, side) not in sigma) <= 2,
                )
                lost = {side: s.duration_us * (sigma.get((me, side), 1.0) - 1.0) for side, _ in beside}
                if worst := max(lost.values()):
                    program.subject_to(
                        f"(9) {name(i)} is slowed down",
                        L[i, lane[j]] >= total(lost[side] * v for side, v in beside) - worst * (2 - u[i][k] - o[pair]),
                    )

    for three in combinations(N, 3):
        if all(pair in o for pair in combinations(three, 2)):
            owned = total((s.sms or 0) * v for n in three for s, v in zip(S[n], u[n], strict=True))
            shared = total(v for n in three for s, v in zip(S[n], u[n], strict=True) if s.sms is None)
            missing = 3 - total(o[pair] for pair in combinations(three, 2)) + shared
            program.subject_to("(10) SMs are owned once", owned <= contention.device_sms * (1 + 2 * missing))

    if contention.power_cap_w < math.inf:
        program.subject_to("(11) power", spare_w * T >= 1e6 * dynamic_j)

    for members in order.values():
        program.subject_to("(12) lanes fit", total(d[i] for i in members) <= T)
    for cycle in problem.cycles():
        for c in range(problem.chunks):
            on_it = [i for i in N if i.task in cycle and i.start <= c < i.stop]
            program.subject_to(f"(13) chunk {c} goes round", total(d[i] for i in on_it) <= T)

    found = program.minimize(T, time_limit_s, gap)
    sms = {i: S[i][next(k for k, v in enumerate(u[i]) if found.chosen(v))].sms for i in N}
    placed = (Placed(i, found(t[i]), found(d[i]), h[i]) for i in N)
    timeline = Timeline(found(T), tuple(sorted(placed, key=lambda p: p.start_us)), found.gap)
    return Shares(timeline, sms, found(dynamic_j))


def needs(problem: Problem, ahead: Mapping[NanoTask, int]) -> list[tuple[NanoTask, NanoTask, int]]:
    """(writer, reader, periods from the writer's to the reader's) of nano-tasks so many layers ahead."""
    members: dict[str, list[NanoTask]] = {}
    for nano in ahead:
        members.setdefault(nano.task, []).append(nano)
    return [
        (i, j, e.layers_back + ahead[i] - ahead[j])
        for e in problem.dependencies
        for i in members.get(e.writer, ())
        for j in members.get(e.reader, ())
        if i.start < j.stop and (e.pages or j.start < i.stop)
    ]


def _unrelated(
    pairs: list[tuple[NanoTask, NanoTask]],
    needed: list[tuple[NanoTask, NanoTask, int]],
    orders: Iterable[list[NanoTask]],
) -> list[tuple[NanoTask, NanoTask]]:
    """The pairs that may overlap: not those of which each, by a chain of (3), (4) and (5), waits for the other."""
    periods = {(i, j): p for i, j, p in sorted(needed, key=lambda e: -e[2])}  # the least counts
    for members in orders:
        periods |= dict.fromkeys(pairwise(members), 0)
        if members:
            periods[members[-1], members[0]] = min(1, periods.get((members[-1], members[0]), 1))
    nodes = list(dict.fromkeys(node for pair in periods for node in pair))
    for via in nodes:
        for i in nodes:
            for j in nodes:
                if (i, via) in periods and (via, j) in periods:
                    through = periods[i, via] + periods[via, j]
                    periods[i, j] = min(through, periods.get((i, j), through))
    return [(i, j) for i, j in pairs if periods.get((i, j), 2) + periods.get((j, i), 2) > 1]


def name(nano: NanoTask) -> str:
    return f"{nano.task} {nano.start}..{nano.stop}"
