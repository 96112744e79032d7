"""Stage one: number, sizes and order of the nano-operations, without interference (paper section 4.1.2).

The program, its symbols and the numbers of its constraints are those of search/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations, permutations

from nanoflow_search.plan.milp import Linear, Program, total
from nanoflow_search.plan.problem import NanoTask, Placed, Problem, Timeline

Slot = tuple[str, int]


def stage_one(
    problem: Problem,
    parts: Mapping[str, int],
    *,
    alike: Mapping[str, str] | None = None,
    period_limit_us: float | None = None,
    time_limit_s: float = math.inf,
    gap: float = 1e-6,
) -> Timeline:
    """The shortest period in which each task has at most `parts` nano-tasks.

    `alike`: task -> the one that it is cut like; by default each has cuts of its own, which takes far longer to solve.
    `period_limit_us`: only plans that are not longer; by default the sequential plan's period.

    Raises:
        Infeasible: no plan keeps the limit; names the constraints.
        OutOfTime: none was found in time.
    """
    program = Program()

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
    d = {i: total(us * z[i][r] for r, us in D[i[0]].items()) for i in N}
    x = {(i, c): total(z[i][a, b] for a, b in z[i] if a <= c < b) for i in N for c in C}
    start = {i: total(float(a) * z[i][a, b] for a, b in z[i]) for i in N}
    stop = {i: total(float(b) * z[i][a, b] for a, b in z[i]) for i in N}

    for i in N:
        program.subject_to(f"(1) {name(i)} has one range", total(z[i].values()).equals(1))
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
                    reads = total(z[j][a, b] for a, b in z[j] if c < b and (e.pages or a <= c) and a < b)
                    program.subject_to(f"(5) {name(j)} reads {name(i)}", v >= x[i, c] + reads - 1)
                slack = (2 - e.layers_back) * M + longest[e.writer]
                program.subject_to(
                    f"(6) {name(j)} after {name(i)}",
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
        program.subject_to(f"(9) lane {problem[lane[0][0]].lane} fits", total(d[i] for i in lane) <= T)
    for cycle in problem.cycles():
        for c in C:
            round_trip = total(
                us * z[o, k][a, b] for o in cycle for k in K[o] for (a, b), us in D[o].items() if a <= c < b
            )
            program.subject_to(f"(10) chunk {c} goes round", round_trip <= T)

    found = program.minimize(T, time_limit_s, gap)
    placed = []
    for i in N:
        a, b = next(r for r in z[i] if found.chosen(z[i][r]))
        if a < b:
            placed.append(Placed(NanoTask(i[0], a, b), found(t[i]), found(d[i]), round(found(h[i]))))
    return Timeline(found(T), tuple(sorted(placed, key=lambda p: p.start_us)), found.gap)


def _empty(problem: Problem, part: int) -> list[tuple[int, int]]:
    """A part may be left out, behind the last chunk; the first one may not."""
    return [(problem.chunks, problem.chunks)] if part else []


def name(slot: Slot) -> str:
    return f"{slot[0]} part {slot[1] + 1}"
