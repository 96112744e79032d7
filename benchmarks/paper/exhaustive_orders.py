"""The optimum of stage one by exhaustion: every partition, layer and order of lanes is tried, without a linear program.

A branch ends where its partial order alone is no shorter than the best plan so far: more order never shortens a plan.
"""

from __future__ import annotations

import math
from itertools import pairwise, product

from nanoflow_search.plan.problem import NanoTask, Problem

EPSILON = 1e-9


def shortest_period_us(problem: Problem, parts: dict[str, int]) -> float:
    """Return the least period of any plan with at most `parts` nano-tasks a task; infinity where there is none."""
    best = math.inf
    plans = sorted((_floor(problem, nanos), nanos) for nanos in partitions(problem, parts))
    for floor, nanos in plans:
        if floor < best - EPSILON:
            best = min(best, _Plan(problem, nanos).shortest(best))
    return best


def partitions(problem: Problem, parts: dict[str, int]) -> list[tuple[NanoTask, ...]]:
    """Return every way to cut every task."""
    choices = []
    for task in problem.tasks:
        ways = []
        for cuts in product((False, True), repeat=problem.chunks - 1):
            ends = [0, *(c + 1 for c, cut in enumerate(cuts) if cut), problem.chunks]
            ranges = list(pairwise(ends))
            if len(ranges) <= parts[task.name] and all(r in task.duration_us for r in ranges):
                ways.append([NanoTask(task.name, *r) for r in ranges])
        choices.append(ways)
    return [tuple(nano for way in ways for nano in way) for ways in product(*choices)]


def _floor(problem: Problem, nanos: tuple[NanoTask, ...]) -> float:
    """No plan of these is shorter: a lane runs one at a time."""
    us = dict.fromkeys(problem.lanes, 0.0)
    for nano in nanos:
        us[problem[nano.task].lane] += problem[nano.task].duration_us[nano.start, nano.stop]
    return max(us.values())


class _Plan:
    """The nano-tasks of one partition, placed one after the other: its layers_ahead, its place in its lane."""

    def __init__(self, problem: Problem, nanos: tuple[NanoTask, ...]) -> None:
        self.nanos = nanos
        self.duration = [problem[n.task].duration_us[n.start, n.stop] for n in nanos]
        self.lane = [problem[n.task].lane for n in nanos]
        self.needs = [  # (writer, reader, layers back)
            (i, j, d.layers_back)
            for d in problem.dependencies
            for i, w in enumerate(nanos)
            for j, r in enumerate(nanos)
            if (w.task, r.task) == (d.writer, d.reader) and w.start < r.stop and (d.pages or r.start < w.stop)
        ]

    def shortest(self, best: float) -> float:
        self.best = best
        self.ahead: list[int] = []
        self.orders: dict[str, list[int]] = {lane: [] for lane in self.lane}
        self._place(0)
        return self.best

    def _place(self, i: int) -> None:
        if i == len(self.nanos):
            self.best = min(self.best, self._period())
            return
        order = self.orders[self.lane[i]]
        for ahead in (0, 1):
            self.ahead.append(ahead)
            for position in range(len(order) + 1):
                order.insert(position, i)
                if self._period() < self.best - EPSILON:
                    self._place(i + 1)
                order.remove(i)
            self.ahead.pop()

    def _period(self) -> float:
        """The least period under what is placed so far: the longest cycle over its turns, by Bellman-Ford."""
        count = len(self.ahead)
        edges: list[tuple[int, int, float, int]] = []  # start[to] >= start[from] + us - periods * T
        for i, j, back in self.needs:
            if i < count and j < count:
                periods = back - self.ahead[j] + self.ahead[i]
                if periods < 0:  # it would have to be read in the period before it is written
                    return math.inf
                edges.append((i, j, self.duration[i], periods))
        for order in self.orders.values():
            for i, j in pairwise(order):
                edges.append((i, j, self.duration[i], 0))
            if order:
                edges.append((order[-1], order[0], self.duration[order[-1]], 1))
        return longest_cycle_us(count, edges)


def longest_cycle_us(count: int, edges: list[tuple[int, int, float, int]]) -> float:
    """The least period T for which starts within 0 .. T exist with start[j] >= start[i] + us - periods x T for every
    edge (i, j, us, periods): the greatest us a period of any cycle."""
    origin = count
    edges = edges + [(origin, i, 0.0, 0) for i in range(count)] + [(i, origin, 0.0, 1) for i in range(count)]
    period = 0.0
    while (cycle := _positive_cycle(count + 1, edges, period)) is not None:
        turns = sum(edges[e][3] for e in cycle)
        if not turns:
            return math.inf
        period = sum(edges[e][2] for e in cycle) / turns
    return period


def _positive_cycle(count: int, edges: list[tuple[int, int, float, int]], period: float) -> list[int] | None:
    """The edges of a cycle that takes longer than its periods."""
    longest, entered = [0.0] * count, [-1] * count
    changed = -1
    for _ in range(count + 1):
        changed = -1
        for e, (i, j, us, periods) in enumerate(edges):
            reached = longest[i] + us - periods * period
            if reached > longest[j] + EPSILON:
                longest[j], entered[j], changed = reached, e, j
        if changed < 0:
            return None
    node = changed
    for _ in range(count):
        node = edges[entered[node]][0]
    cycle, at = [], node
    while not cycle or at != node:
        cycle.append(entered[at])
        at = edges[entered[at]][0]
    return cycle
