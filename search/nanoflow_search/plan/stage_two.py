"""Stage two decides the SMs of each nano-task, under mutual interference and the power cap (NanoFlow, section 4.1.3).

docs/search.md derives the program; the numbers of the constraints are the same there. Symbols:

    N       nano-tasks i, in the order of stage one     S[i]       shares that i may have
    lane[i] lane of i                                   order      nano-tasks of each lane, in their order
    h[i]    layers that i is ahead                      E          (writer, reader, periods between them)
    free    pairs that may overlap                      sigma      slowdown of a task's share beside another's
    T       period (minimised)                          t[i]       start of i in the period
    u[i][k] 1: i has its share k                        o[i, j]    1: i and j may overlap
    y[i, j] 1: i runs before j                          L[i, lane] time that i loses to a lane
    d[i]    time of i, losses included                  M          longest period that is allowed

A constraint that holds only in one case is relaxed by a *big-M* term: `bound * (1 - binary)` makes it void while the
binary is 0. The bound must be at least the largest violation possible. Starts are at most T <= M and durations at most
M, so that 2 M is enough for (6) and (7).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

from nanoflow_backend.schedule.plan import Group
from nanoflow_search.plan.contention import Contention, TaskShare
from nanoflow_search.plan.milp import Milp, lin_sum
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem


@dataclass(frozen=True)
class ShareAssignment:
    """A timeline under interference, with the SMs of each nano-task."""

    timeline: CyclicTimeline
    sms: Mapping[NanoTask, int | None]  # the most that it may use; None: all, shared
    dynamic_j: float  # of one period, beyond static power
    groups: tuple[Group, ...] = ()  # how decodes are dealt out to the batch's rows; (): all come first


def stage_two(
    problem: Problem,
    ordered: CyclicTimeline,
    contention: Contention,
    *,
    period_limit_us: float | None = None,
    time_limit_s: float = math.inf,
    gap: float = 1e-6,
) -> ShareAssignment:
    """Return the shortest period with the nano-tasks, lane orders and layers of `ordered`, which stage one found.

    `period_limit_us` is M; default: every task serially at its fastest share, stretched to the power cap.

    Raises:
        Infeasible: no plan keeps the limit; the message names a constraint.
        OutOfTime: no plan was found in time.
    """
    program = Milp()

    # Sets
    N = [p.nano for p in ordered.placed]  # ascending by start, so that a lane's are in its order
    S = {i: contention.choices[i] for i in N}
    lane = {i: problem[i.task].lane for i in N}
    order = {name: [i for i in N if lane[i] == name] for name in problem.lanes}
    h = {p.nano: p.layers_ahead for p in ordered.placed}
    E = nano_dependencies(problem, h)
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
        i: lin_sum(s.duration_us * u[i][k] for k, s in enumerate(S[i]))
        + lin_sum(L[i, name] for name in order if name != lane[i])
        for i in N
    }
    dynamic_j = lin_sum(s.dynamic_j * u[i][k] for i in N for k, s in enumerate(S[i]))

    for i in N:
        program.subject_to(f"(1) {i.label} has one share", lin_sum(u[i]).equals(1))
        program.subject_to("(2) starts are in the period", t[i] <= T)

    for i, j, periods in E:
        program.subject_to(f"(3) {j.label} after {i.label}", t[j] + float(periods) * T >= t[i] + d[i])

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
                me = TaskShare(i.task, s.sms)
                beside = [(TaskShare(j.task, other.sms), u[j][m]) for m, other in enumerate(S[j])]
                program.subject_to(
                    "(8) what overlaps may run beside each other",
                    u[i][k] + o[pair] + lin_sum(v for side, v in beside if (me, side) not in sigma) <= 2,
                )
                lost = {side: s.duration_us * (sigma.get((me, side), 1.0) - 1.0) for side, _ in beside}
                if worst := max(lost.values()):
                    program.subject_to(
                        f"(9) {i.label} is slowed down",
                        L[i, lane[j]]
                        >= lin_sum(lost[side] * v for side, v in beside) - worst * (2 - u[i][k] - o[pair]),
                    )

    for three in combinations(N, 3):
        if all(pair in o for pair in combinations(three, 2)):
            owned = lin_sum((s.sms or 0) * v for n in three for s, v in zip(S[n], u[n], strict=True))
            shared = lin_sum(v for n in three for s, v in zip(S[n], u[n], strict=True) if s.sms is None)
            missing = 3 - lin_sum(o[pair] for pair in combinations(three, 2)) + shared
            program.subject_to("(10) SMs are owned once", owned <= contention.device_sms * (1 + 2 * missing))

    if contention.power_cap_w < math.inf:
        program.subject_to("(11) power", spare_w * T >= 1e6 * dynamic_j)

    for members in order.values():
        program.subject_to("(12) lanes fit", lin_sum(d[i] for i in members) <= T)
    for cycle in problem.cycles():
        for c in range(problem.chunks):
            on_it = [i for i in N if i.task in cycle and i.start <= c < i.stop]
            program.subject_to(f"(13) chunk {c} goes round", lin_sum(d[i] for i in on_it) <= T)

    found = program.minimize(T, time_limit_s, gap)
    sms = {i: S[i][next(k for k, v in enumerate(u[i]) if found.chosen(v))].sms for i in N}
    placed = (PlacedTask(i, found(t[i]), found(d[i]), h[i]) for i in N)
    timeline = CyclicTimeline(found(T), tuple(sorted(placed, key=lambda p: p.start_us)), found.gap)
    return ShareAssignment(timeline, sms, found(dynamic_j))


def nano_dependencies(problem: Problem, ahead: Mapping[NanoTask, int]) -> list[tuple[NanoTask, NanoTask, int]]:
    """Return (writer, reader, periods from the writer's to the reader's) for all nano-tasks that depend on each other.

    `ahead` says for each nano-task how many layers it is ahead.
    """
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
    """Return the pairs that may overlap.

    A pair cannot overlap if chains of (3), (4) and (5) make each of the two wait for the other within one period. The
    fewest periods along a chain are found like all shortest paths (Floyd-Warshall).
    """
    # Of several dependencies of one pair, the one with the fewest periods counts.
    periods = {(i, j): p for i, j, p in sorted(needed, key=lambda e: -e[2])}
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
