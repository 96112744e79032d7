"""The optimum of stage two by exhaustion, without a linear program.

Every choice of shares is tried, and each pair in two lanes before, after and beside each other. A branch ends where
what is decided is no shorter than the best plan so far.
"""

from __future__ import annotations

import math
from itertools import combinations, pairwise, product

from nanoflow_search.plan.contention import Contention, ShareChoice, TaskShare
from nanoflow_search.plan.problem import CyclicTimeline, Problem

from benchmarks.paper.exhaustive_orders import EPSILON, longest_cycle_us


def shortest_period_us(problem: Problem, ordered: CyclicTimeline, contention: Contention) -> float:
    """Return the least period; infinity where no choice of shares allows a plan."""
    nanos = [p.nano for p in ordered.placed]
    best = math.inf
    for choices in product(*(contention.choices[n] for n in nanos)):
        best = min(best, _Chosen(problem, ordered, contention, choices).shortest(best))
    return best


class _Chosen:
    """A plan whose shares are chosen: each pair of nano-tasks in two lanes is still to be put in its relation."""

    def __init__(
        self, problem: Problem, ordered: CyclicTimeline, contention: Contention, choices: tuple[ShareChoice, ...]
    ) -> None:
        self.contention, self.choices = contention, choices
        self.nanos = [p.nano for p in ordered.placed]
        self.lane = [problem[n.task].lane for n in self.nanos]
        ahead = [p.layers_ahead for p in ordered.placed]
        self.fixed = [  # (from, to, periods): to starts when from has ended, that many periods before
            (i, j, d.layers_back - ahead[j] + ahead[i])
            for d in problem.dependencies
            for i, w in enumerate(self.nanos)
            for j, r in enumerate(self.nanos)
            if (w.task, r.task) == (d.writer, d.reader) and w.start < r.stop and (d.pages or r.start < w.stop)
        ]
        for name in set(self.lane):
            members = [i for i in range(len(self.nanos)) if self.lane[i] == name]
            self.fixed += [(i, j, 0) for i, j in pairwise(members)] + [(members[-1], members[0], 1)]
        self.pairs = [(i, j) for i, j in combinations(range(len(self.nanos)), 2) if self.lane[i] != self.lane[j]]

    def shortest(self, best: float) -> float:
        self.best = best
        self.overlaps: set[tuple[int, int]] = set()
        self.edges = list(self.fixed)
        if self._period() < best - EPSILON:
            self._relate(0)
        return self.best

    def _relate(self, index: int) -> None:
        if index == len(self.pairs):
            self.best = min(self.best, self._period())
            return
        i, j = self.pairs[index]
        for relation in ((i, j), (j, i)):
            first, second = relation
            self.edges += [(first, second, 0), (second, first, 1)]
            if self._period() < self.best - EPSILON:
                self._relate(index + 1)
            del self.edges[-2:]
        if self._may_overlap(i, j):
            self.overlaps.add((i, j))
            if self._period() < self.best - EPSILON:
                self._relate(index + 1)
            self.overlaps.remove((i, j))

    def _side(self, i: int) -> TaskShare:
        return TaskShare(self.nanos[i].task, self.choices[i].sms)

    def _may_overlap(self, i: int, j: int) -> bool:
        slowdown = self.contention.slowdown
        if (self._side(i), self._side(j)) not in slowdown or (self._side(j), self._side(i)) not in slowdown:
            return False
        for k in range(len(self.nanos)):
            pairs = {tuple(sorted((i, k))), tuple(sorted((j, k)))}
            caps = [self.choices[n].sms for n in (i, j, k)]
            if pairs <= self.overlaps and None not in caps and sum(map(int, caps)) > self.contention.device_sms:
                return False
        return True

    def _period(self) -> float:
        durations = []
        for i, choice in enumerate(self.choices):
            lost = dict.fromkeys(self.lane, 0.0)  # by the worst partner in each other lane
            for pair in self.overlaps:
                if i in pair:
                    j = pair[0] + pair[1] - i
                    slower = self.contention.slowdown[self._side(i), self._side(j)] - 1
                    lost[self.lane[j]] = max(lost[self.lane[j]], choice.duration_us * slower)
            durations.append(choice.duration_us + sum(lost.values()))
        energy_j = sum(choice.dynamic_j for choice in self.choices)
        spare_w = self.contention.power_cap_w - self.contention.static_w
        powered = 1e6 * energy_j / spare_w
        if any(periods < 0 for _, _, periods in self.edges):
            return math.inf
        edges = [(i, j, durations[i], periods) for i, j, periods in self.edges]
        return max(powered, longest_cycle_us(len(self.nanos), edges))
