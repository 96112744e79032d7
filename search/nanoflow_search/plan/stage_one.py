"""Stage one decides the number, sizes and order of nano-tasks, without interference (NanoFlow, section 4.1.2).

docs/search.md derives the program; the numbers of the constraints are the same there. Symbols:

    C       chunks of the batch                     K[o]    parts that task o may have
    N       slots i = (o, k): part k of task o      g[o]    the task whose cuts o shares
    D[o][r] time of task o on the range r = [a, b)  M       longest period that is allowed
    T       period (minimised)                      t[i]    start of slot i in the period
    h[i]    1: slot i is a layer ahead              hT[i]   the product h[i] T
    z[i][r] 1: slot i has the range r               y[i, j] 1: i runs before j in their lane
    d[i]    time of slot i                          x[i, c] 1: slot i holds chunk c
    v       1: slot j reads what slot i writes      longest longest time of each task

A constraint that holds only in one case is relaxed by a *big-M* term: `bound * (1 - binary)` makes it void while the
binary is 0. The bound must be at least the largest violation possible. Starts and periods are at most M, and a slot of
task o takes at most `longest[o]`, so that M + longest[o] is enough for the order in a lane (7).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, permutations

from nanoflow_search.plan.milp import Linear, Milp, lin_sum
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem

Slot = tuple[str, int]  # (task, number of its part)


def stage_one(
    problem: Problem,
    parts: Mapping[str, int],
    *,
    alike: Mapping[str, str] | None = None,
    period_limit_us: float | None = None,
    time_limit_s: float = math.inf,
    gap: float = 1e-6,
) -> CyclicTimeline:
    """Return the shortest period in which each task has at most `parts[task]` nano-tasks.

    `alike` maps a task to the task whose cuts it shares. By default each task has cuts of its own, which takes far
    longer to solve. `period_limit_us` is M, by default the period of the sequential plan.

    Raises:
        Infeasible: no plan keeps the limit; the message names a constraint.
        OutOfTime: no plan was found in time.
    """
    program = Milp()

    # Sets
    C = range(problem.chunks)
    K = {task.name: range(parts[task.name]) for task in problem.tasks}
    N: list[Slot] = [(o, k) for o in K for k in K[o]]
    lanes = [[i for i in N if problem[i[0]].lane == lane] for lane in problem.lanes]

    # Parameters
    g = {o: (alike or {}).get(o, o) for o in K}
    D = {task.name: task.duration_us for task in problem.tasks}
    M = period_limit_us if period_limit_us is not None else problem.sequential_us()
    longest = {o: max(D[o].values()) for o in D}

    # Variables
    T = program.real(upper=M)
    t = {i: program.real() for i in N}
    h = {i: program.binary() for i in N}
    hT = {i: program.real() for i in N}
    z: dict[Slot, dict[tuple[int, int], Linear]] = {}
    for o, k in N:
        z[o, k] = z[g[o], k] if g[o] != o else {r: program.binary() for r in (*D[o], *_empty(problem, k))}
    y = {(i, j): program.binary() for lane in lanes for i, j in combinations(lane, 2)}

    # Expressions
    d = {i: lin_sum(us * z[i][r] for r, us in D[i[0]].items()) for i in N}
    x = {(i, c): lin_sum(z[i][a, b] for a, b in z[i] if a <= c < b) for i in N for c in C}
    start = {i: lin_sum(float(a) * z[i][a, b] for a, b in z[i]) for i in N}
    stop = {i: lin_sum(float(b) * z[i][a, b] for a, b in z[i]) for i in N}

    for i in N:
        program.subject_to(f"(1) {slot_name(i)} has one range", lin_sum(z[i].values()).equals(1))
    for o in K:
        program.subject_to(f"(2) {o} starts at the first chunk", start[o, 0].equals(0))
        for k in K[o][1:]:
            program.subject_to(f"(2) the parts of {o} follow each other", start[o, k].equals(stop[o, k - 1]))
        program.subject_to(f"(2) {o} ends at the last chunk", stop[o, len(K[o]) - 1].equals(problem.chunks))

    for i in N:
        program.subject_to("(3) starts are in the period", t[i] <= T)
        program.subject_to("(4) h T is 0 or T", hT[i] <= M * h[i])
        program.subject_to("(4) h T is 0 or T", hT[i] <= T)
        program.subject_to("(4) h T is 0 or T", hT[i] >= T - M * (1 - h[i]))

    for e in problem.dependencies:
        for k in K[e.writer]:
            for m in K[e.reader]:
                i, j = (e.writer, k), (e.reader, m)
                same = g[i[0]] == g[j[0]]
                if same and k != m and not (e.pages and k < m):
                    continue
                v = program.real(lower=float(same), upper=1.0)
                for c in C if not same else ():
                    reads = lin_sum(z[j][a, b] for a, b in z[j] if c < b and (e.pages or a <= c) and a < b)
                    program.subject_to(f"(5) {slot_name(j)} reads {slot_name(i)}", v >= x[i, c] + reads - 1)
                slack = (2 - e.layers_back) * M + longest[e.writer]
                program.subject_to(
                    f"(6) {slot_name(j)} after {slot_name(i)}",
                    t[j] - hT[j] + e.layers_back * T >= t[i] - hT[i] + d[i] - slack * (1 - v),
                )

    for lane in lanes:
        for i, j in combinations(lane, 2):
            program.subject_to(
                "(7) a lane runs one at a time", t[j] >= t[i] + d[i] - (M + longest[i[0]]) * (1 - y[i, j])
            )
            program.subject_to("(7) a lane runs one at a time", t[i] >= t[j] + d[j] - (M + longest[j[0]]) * y[i, j])
        for i, j in permutations(lane, 2):
            program.subject_to("(8) a lane ends before its next period", t[i] + d[i] <= t[j] + T)

    for lane in lanes:
        program.subject_to(f"(9) lane {problem[lane[0][0]].lane} fits", lin_sum(d[i] for i in lane) <= T)
    for cycle in problem.cycles():
        for c in C:
            round_trip = lin_sum(
                us * z[o, k][a, b] for o in cycle for k in K[o] for (a, b), us in D[o].items() if a <= c < b
            )
            program.subject_to(f"(10) chunk {c} goes round", round_trip <= T)

    found = program.minimize(T, time_limit_s, gap)
    placed = []
    for i in N:
        a, b = next(r for r in z[i] if found.chosen(z[i][r]))
        if a < b:
            placed.append(PlacedTask(NanoTask(i[0], a, b), found(t[i]), found(d[i]), round(found(h[i]))))
    return CyclicTimeline(found(T), tuple(sorted(placed, key=lambda p: p.start_us)), found.gap)


def _empty(problem: Problem, part: int) -> list[tuple[int, int]]:
    """Return the empty range behind the last chunk, for parts that may be left out: all but a task's first."""
    return [(problem.chunks, problem.chunks)] if part else []


def slot_name(slot: Slot) -> str:
    """Return the name of a slot in messages; parts are counted from 1."""
    return f"{slot[0]} part {slot[1] + 1}"
