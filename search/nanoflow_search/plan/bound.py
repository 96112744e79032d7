"""Lower bounds say how short a period can be at best: no plan beats them, whatever its cuts and orders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from math import comb

from nanoflow_search.plan.contention import Contention, ShareChoice, TaskShare, measured_contention, share_choice
from nanoflow_search.plan.milp import Milp, lin_sum
from nanoflow_search.plan.problem import NanoTask, Problem
from nanoflow_search.plan.two_stages import sequential_assignment
from nanoflow_search.predict.predict import LOWEST_CLOCK_SHARE, Timing, highest_clock_within_cap
from nanoflow_search.predict.timing_model import TimingModel


def bounds_us(problem_at: Callable[[TimingModel], Problem], model: TimingModel, chunk_tokens: int) -> dict[str, float]:
    """Return the bounds by name, in us: each lane's work uncut, the packing, and power.

    They are evaluated at the highest clock whose energy, in the packing time, stays within the power cap. At a higher
    clock power would be the bound, at a lower one compute. `problem_at` gives the problem with a timing model's times.
    """
    header = model.profile.header
    # Two loads side by side may take less energy than each alone. A bound assumes the best pair that was measured, for
    # every two lanes.
    least_of_two = min([1.0, *(pair.energy_ratio for pair in model.profile.pairs)])

    def packed(clock_mhz: float) -> tuple[Problem, float, float]:
        """Return the problem, the packing time in us, and the least dynamic energy of all tasks in J."""
        there = model.at(clock_mhz)
        problem = problem_at(there)
        contention = measured_contention(there, problem, sequential_assignment(problem).timeline, chunk_tokens)
        whole = (0, problem.chunks * chunk_tokens, None)
        dynamic_j = sum(share_choice(there, task.operations, *whole).dynamic_j for task in problem.tasks)
        least = least_of_two ** comb(len(problem.lanes), 2)
        return problem, packing_bound_us(problem, contention), least * dynamic_j

    def timed(clock_mhz: float) -> Timing:
        _, layer_us, dynamic_j = packed(clock_mhz)
        power_w = header.static_w + 1e6 * dynamic_j / layer_us
        return Timing(layer_us, clock_mhz, power_w, power_w * layer_us * 1e-6)

    highest = model.profile.clocks_mhz[-1]
    within_cap = highest_clock_within_cap(timed, LOWEST_CLOCK_SHARE * highest, highest, header.power_cap_w)
    problem, packing_us, dynamic_j = packed(within_cap.clock_mhz)
    power_us = 1e6 * dynamic_j / (header.power_cap_w - header.static_w)
    return {
        "power": power_us,
        **{f"{lane} lane": problem.lane_us(lane) for lane in problem.lanes},
        "packing": packing_us,
    }


def packing_bound_us(problem: Problem, contention: Contention) -> float:
    """Return the least time of all tasks if they may be stopped, resumed and reordered at will.

    Each moment runs at most one task of each lane, under shares that may run side by side; a linear program chooses how
    long each such combination lasts. `contention` is that of whole tasks, since cutting is free here.

    Raises:
        Infeasible: a task has no share that may run.
    """
    sides: list[list[tuple[NanoTask, ShareChoice] | None]] = []
    for lane in problem.lanes:
        whole = [NanoTask(task.name, 0, problem.chunks) for task in problem.tasks if task.lane == lane]
        sides.append([None, *((nano, choice) for nano in whole for choice in contention.choices[nano])])
    together = [running for row in product(*sides) if (running := [r for r in row if r]) and _may(running, contention)]

    program = Milp()
    lasts = [program.real() for _ in together]
    for task in problem.tasks:
        done = lin_sum(
            lasts[k] * (1 / _duration_us(choice, nano, running, contention))
            for k, running in enumerate(together)
            for nano, choice in running
            if nano.task == task.name
        )
        program.subject_to(f"(1) {task.name} is done", done.equals(1))
    return program.minimize(lin_sum(lasts)).objective


def _may(running: list[tuple[NanoTask, ShareChoice]], contention: Contention) -> bool:
    pairs = combinations((TaskShare(nano.task, choice.sms) for nano, choice in running), 2)
    measured = all((a, b) in contention.slowdown and (b, a) in contention.slowdown for a, b in pairs)
    caps = [choice.sms for _, choice in running]
    return measured and (None in caps or sum(sms or 0 for sms in caps) <= contention.device_sms)


def _duration_us(
    choice: ShareChoice, nano: NanoTask, running: list[tuple[NanoTask, ShareChoice]], contention: Contention
) -> float:
    me = TaskShare(nano.task, choice.sms)
    others = (TaskShare(other.task, beside.sms) for other, beside in running if other != nano)
    return choice.duration_us * (1 + sum(contention.slowdown[me, side] - 1 for side in others))
