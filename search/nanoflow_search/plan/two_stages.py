"""The two stages are solved in turns, from few nano-tasks to more, as long as more of them make a better plan."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from nanoflow_search.checkpoint import Run
from nanoflow_search.plan.contention import measured_contention
from nanoflow_search.plan.milp import OutOfTime
from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, PlacedTask, Problem
from nanoflow_search.plan.stage_one import stage_one
from nanoflow_search.plan.stage_two import ShareAssignment, stage_two
from nanoflow_search.predict.timing_model import TimingModel
from nanoflow_search.request import Effort

# The most nano-tasks of each task: (up to attention, where three resources meet; after it). Tried in this order.
PART_LIMITS = ((2, 2), (3, 2), (4, 2), (3, 3))
MOST_SLOWDOWN = {"compute": 1.5, "memory": 2.8, "network": 2.8}  # the largest guess of what a lane suffers
WORTH_MORE_PARTS = 0.995  # a plan that is not half a percent shorter is not worth more nano-tasks


@dataclass(frozen=True)
class LayerPlan:
    """A plan of one layer as the two stages predict it."""

    shares: ShareAssignment
    parts: Mapping[str, int]  # the most nano-tasks that each task was allowed
    clock_mhz: float  # of the times and energies that it was planned with
    sequential_us: float
    stage_one_gap: float

    @property
    def predicted_us(self) -> float:
        """The period."""
        return self.shares.timeline.period_us

    @property
    def gap(self) -> float:
        """The solver's relative gap, in the worse of the two stages."""
        return max(self.stage_one_gap, self.shares.timeline.gap)

    @property
    def gain(self) -> float:
        """The predicted time of one operation after the other over that of the plan."""
        return self.sequential_us / self.predicted_us


def find_plans(
    problem: Problem,
    model: TimingModel,
    chunk_tokens: int,
    effort: Effort,
    run: Run,
    *,
    part_limits: Sequence[tuple[int, int]] = PART_LIMITS,
    partition: Mapping[str, int] | None = None,
    seed: int = 0,
) -> list[LayerPlan]:
    """Return all plans that the two stages find, best first. Sequential is not among them.

    Stage one knows no interference, and orders that are equally good to it are not so to stage two. So it is solved
    several times for each of `part_limits`, on stretched durations: at first they are not stretched, then by what each
    lane suffered in the best plan so far, then by random guesses (from `seed`). The next limits are tried as long as
    the best plan gains by them. `partition` gives the SMs of each lane, with which the problem's times were taken.
    """
    before = _up_to_attention(problem)
    alike = _shared_cuts(problem, before)
    rng = random.Random(seed)
    plans: list[LayerPlan] = []
    for front, back in part_limits:
        parts = {task.name: front if task.name in before else back for task in problem.tasks}
        reached_us = min((plan.predicted_us for plan in plans), default=math.inf)
        for turn in range(effort.turns):
            stretched = _stretched(problem, _slowdown_guess(problem, plans, turn, rng))
            name = f"{front}-{back}-{turn}.msgpack"
            if (found := run.checkpoint.load(name, list[LayerPlan])) is None:
                found = run.checkpoint.save(
                    name, _solve(problem, stretched, model, parts, alike, chunk_tokens, partition, effort.time_limit_s)
                )
            plans += found
            run.say(f"{front} and {back} parts: {_outcome(found, effort.time_limit_s)}")
        if min((plan.predicted_us for plan in plans), default=math.inf) > WORTH_MORE_PARTS * reached_us:
            break
    return sorted(plans, key=_predicted_us)


def sequential_assignment(problem: Problem) -> ShareAssignment:
    """Return the plan that needs no search: one task after the other on the whole batch, on all of the device."""
    placed: list[PlacedTask] = []
    for task in problem.tasks:
        start_us = placed[-1].start_us + placed[-1].duration_us if placed else 0.0
        whole = (0, problem.chunks)
        placed.append(PlacedTask(NanoTask(task.name, *whole), start_us, task.duration_us[whole], 0))
    timeline = CyclicTimeline(problem.sequential_us(), tuple(placed))
    return ShareAssignment(timeline, {p.nano: None for p in placed}, 0.0)


def _solve(
    problem: Problem,
    stretched: Problem,
    model: TimingModel,
    parts: Mapping[str, int],
    alike: Mapping[str, str],
    chunk_tokens: int,
    partition: Mapping[str, int] | None,
    time_limit_s: float,
) -> list[LayerPlan]:
    """Solve stage one on the stretched problem, then stage two at each clock level; no plan if time ran out."""
    try:
        ordered = stage_one(stretched, parts, alike=alike, time_limit_s=time_limit_s)
        plans = []
        for clock_mhz in model.profile.clocks_mhz:
            contention = measured_contention(model.at(clock_mhz), problem, ordered, chunk_tokens, partition)
            shares = stage_two(problem, ordered, contention, time_limit_s=time_limit_s)
            plans.append(LayerPlan(shares, parts, clock_mhz, problem.sequential_us(), ordered.gap))
        return plans
    except OutOfTime:
        return []


def _outcome(found: Sequence[LayerPlan], time_limit_s: float) -> str:
    if not found:
        return f"nothing within {time_limit_s:g} s"
    best = min(found, key=_predicted_us)
    return f"{best.predicted_us:.0f} us, {best.gain:.3f}x sequential"


def _up_to_attention(problem: Problem) -> set[str]:
    """Return attention and the tasks that it waits for through the pages."""
    return {name for d in problem.dependencies if d.pages for name in (d.writer, d.reader)}


def _shared_cuts(problem: Problem, before: set[str]) -> dict[str, str]:
    """Map each task to the first one of its group, whose cuts it shares: those up to attention, and those after it."""
    groups: dict[bool, str] = {}
    return {task.name: groups.setdefault(task.name in before, task.name) for task in problem.tasks}


def _predicted_us(plan: LayerPlan) -> float:
    return plan.predicted_us


def _slowdown_guess(problem: Problem, plans: Sequence[LayerPlan], turn: int, rng: random.Random) -> dict[str, float]:
    """Return by how much stage one is to stretch each task in this turn."""
    if turn == 0:
        return {task.name: 1.0 for task in problem.tasks}
    if turn == 1 and plans:
        by_lane = _lane_slowdowns(problem, min(plans, key=_predicted_us).shares.timeline)
        return {task.name: by_lane[task.lane] for task in problem.tasks}
    return {task.name: rng.uniform(1.0, MOST_SLOWDOWN[task.lane]) for task in problem.tasks}


def _stretched(problem: Problem, slowdown: Mapping[str, float]) -> Problem:
    tasks = tuple(
        replace(task, duration_us={r: us * slowdown[task.name] for r, us in task.duration_us.items()})
        for task in problem.tasks
    )
    return replace(problem, tasks=tasks)


def _lane_slowdowns(problem: Problem, timeline: CyclicTimeline) -> dict[str, float]:
    """Return for each lane the time of its nano-tasks in a plan over their time alone."""
    taken_us, alone_us = dict.fromkeys(problem.lanes, 0.0), dict.fromkeys(problem.lanes, 0.0)
    for p in timeline.placed:
        task = problem[p.nano.task]
        taken_us[task.lane] += p.duration_us
        alone_us[task.lane] += task.duration_us[p.nano.start, p.nano.stop]
    return {lane: taken_us[lane] / alone_us[lane] for lane in taken_us}
