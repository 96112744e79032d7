"""find_plans: stage one and stage two in turns, from few nano-operations to more, as long as it helps."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from nanoflow_search.checkpoint import Once, always
from nanoflow_search.plan.milp import OutOfTime
from nanoflow_search.plan.problem import NanoTask, Placed, Problem, Timeline
from nanoflow_search.plan.stage_one import stage_one
from nanoflow_search.plan.stage_two import Shares, stage_two
from nanoflow_search.predict.timing_model import Measured

PARTS = ((2, 2), (3, 2), (4, 2), (3, 3))  # before and in attention, where three resources meet; and after it
TURNS = 4  # of the two stages for each of them
SLOWER = {"compute": 1.5, "memory": 2.8, "network": 2.8}  # what a guess of a lane's slowdown goes up to
ENOUGH = 0.995  # a plan that is not half a percent shorter is not worth more nano-operations


@dataclass(frozen=True)
class Plan:
    """A plan of one layer, as predicted."""

    shares: Shares
    parts: Mapping[str, int]
    clock_mhz: float  # of the times and energies that it was planned with
    sequential_us: float
    stage_one_gap: float

    @property
    def predicted_us(self) -> float:
        return self.shares.timeline.period_us

    @property
    def gap(self) -> float:
        """Of the solver, in the worse of the two programs."""
        return max(self.stage_one_gap, self.shares.timeline.gap)

    @property
    def gain(self) -> float:
        """Predicted, over one operation after the other."""
        return self.sequential_us / self.predicted_us


def find_plans(
    problem: Problem,
    measured: Measured,
    chunk_tokens: int,
    *,
    parts: Sequence[tuple[int, int]] = PARTS,
    turns: int = TURNS,
    partition: Mapping[str, int] | None = None,
    time_limit_s: float = 60.0,
    seed: int = 0,
    once: Once = always,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """All the plans found, best first.

    Stage one knows no interference, and orders that are equally good to it are not to stage two. So it is asked again:
    with durations stretched by what the lanes suffered in the best plan, then by guesses (`seed`).

    `parts`: at most so many nano-tasks of each task up to attention, and of each after it; tried in turn, until one
    does not help. `partition`: SMs of each lane, those of the problem's times. `time_limit_s` is that of each program.
    A turn that `once` knows is not solved again.

    Sequential is not among them: it needs no search.
    """
    before = _before_attention(problem)
    groups = {
        True: [t for t in problem.tasks if t.name in before],
        False: [t for t in problem.tasks if t.name not in before],
    }
    alike = {task.name: tasks[0].name for tasks in groups.values() for task in tasks}
    rng = random.Random(seed)
    plans: list[Plan] = []
    for front, back in parts:
        most = {task.name: front if task.name in before else back for task in problem.tasks}
        reached = min((plan.predicted_us for plan in plans), default=math.inf)
        for turn in range(turns):
            stretched = _stretched(problem, _slower(problem, plans, turn, rng))

            def solve(stretched: Problem = stretched, most: dict[str, int] = most) -> list[Plan]:
                try:
                    ordered = stage_one(stretched, most, alike=alike, time_limit_s=time_limit_s)
                    return [
                        _share(problem, measured.at(clock), ordered, most, chunk_tokens, partition, time_limit_s)
                        for clock in measured.profile.clocks_mhz
                    ]
                except OutOfTime:
                    return []

            found = once(f"{front}-{back}-{turn}.msgpack", list[Plan], solve)
            plans += found
            outcome = (
                f"{(best := min(found, key=_predicted_us)).predicted_us:.0f} us, {best.gain:.3f}x sequential"
                if found
                else f"nothing within {time_limit_s:g} s"
            )
            progress(f"{front} and {back} parts: {outcome}")
        if min((plan.predicted_us for plan in plans), default=math.inf) > ENOUGH * reached:
            break
    return sorted(plans, key=_predicted_us)


def one_after_the_other(problem: Problem) -> Shares:
    """The plan without a search: each task on the whole batch, with all of the device."""
    placed: list[Placed] = []
    for task in problem.tasks:
        start_us = placed[-1].start_us + placed[-1].duration_us if placed else 0.0
        whole = (0, problem.chunks)
        placed.append(Placed(NanoTask(task.name, *whole), start_us, task.duration_us[whole], 0))
    return Shares(Timeline(problem.sequential_us(), tuple(placed)), {p.nano: None for p in placed}, 0.0)


def _before_attention(problem: Problem) -> set[str]:
    """Attention, and what it waits for through the pages."""
    return {name for d in problem.dependencies if d.pages for name in (d.writer, d.reader)}


def _predicted_us(plan: Plan) -> float:
    return plan.predicted_us


def _slower(problem: Problem, plans: Sequence[Plan], turn: int, rng: random.Random) -> dict[str, float]:
    """By how much stage one is to stretch each task in this turn."""
    if turn == 0:
        return {task.name: 1.0 for task in problem.tasks}
    if turn == 1 and plans:
        by_lane = _slowdowns(problem, min(plans, key=_predicted_us).shares.timeline)
        return {task.name: by_lane[task.lane] for task in problem.tasks}
    return {task.name: rng.uniform(1.0, SLOWER[task.lane]) for task in problem.tasks}


def _stretched(problem: Problem, slower: Mapping[str, float]) -> Problem:
    tasks = tuple(
        replace(task, duration_us={r: us * slower[task.name] for r, us in task.duration_us.items()})
        for task in problem.tasks
    )
    return replace(problem, tasks=tasks)


def _share(
    problem: Problem,
    measured: Measured,
    ordered: Timeline,
    parts: Mapping[str, int],
    chunk_tokens: int,
    partition: Mapping[str, int] | None,
    time_limit_s: float,
) -> Plan:
    contention = measured.contention(problem, ordered, chunk_tokens, partition)
    shares = stage_two(problem, ordered, contention, time_limit_s=time_limit_s)
    clock_mhz = measured.clock_mhz or max(measured.profile.clocks_mhz)
    return Plan(shares, parts, clock_mhz, problem.sequential_us(), ordered.gap)


def _slowdowns(problem: Problem, timeline: Timeline) -> dict[str, float]:
    taken, alone = dict.fromkeys(problem.lanes, 0.0), dict.fromkeys(problem.lanes, 0.0)
    for p in timeline.placed:
        task = problem[p.nano.task]
        taken[task.lane] += p.duration_us
        alone[task.lane] += task.duration_us[p.nano.start, p.nano.stop]
    return {lane: taken[lane] / alone[lane] for lane in taken}
