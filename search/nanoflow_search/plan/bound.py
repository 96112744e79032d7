"""What no plan can beat, whatever its cuts and orders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from math import comb

from nanoflow_search.plan.milp import Program, total
from nanoflow_search.plan.problem import NanoTask, Problem
from nanoflow_search.plan.stage_two import Choice, Contention, Side
from nanoflow_search.plan.two_stages import one_after_the_other
from nanoflow_search.predict.predict import LOWEST, Timing, settled
from nanoflow_search.predict.timing_model import Measured


def bounds_us(problem_at: Callable[[Measured], Problem], measured: Measured, chunk_tokens: int) -> dict[str, float]:
    """By name, each what no plan goes below: a lane's work uncut, the packing, and power.

    At one clock, the highest at which the cap lets through the energy of all tasks, as little as any pair was seen to
    take, in the time of the packing: a higher one takes longer for the energy, a lower one for the work. `problem_at`:
    of times at a clock.
    """
    header = measured.profile.header
    # Side by side the same work was seen to take less than each alone at that clock: any plan might have it so.
    least_of_two = min([1.0, *(pair.energy_ratio for pair in measured.profile.pairs)])

    def packed(clock_mhz: float) -> tuple[Problem, float, float]:
        """With the time of the packing, and the tasks' dynamic energy."""
        there = measured.at(clock_mhz)
        problem = problem_at(there)
        contention = there.contention(problem, one_after_the_other(problem).timeline, chunk_tokens)
        whole = (0, problem.chunks * chunk_tokens, None)
        dynamic_j = sum(there.choice(task.operations, *whole).dynamic_j for task in problem.tasks)
        least = least_of_two ** comb(len(problem.lanes), 2)
        return problem, packing_bound_us(problem, contention), least * dynamic_j

    def timed(clock_mhz: float) -> Timing:
        _, layer_us, dynamic_j = packed(clock_mhz)
        power_w = header.static_w + 1e6 * dynamic_j / layer_us
        return Timing(layer_us, clock_mhz, power_w, power_w * layer_us * 1e-6)

    highest = measured.profile.clocks_mhz[-1]
    problem, packing_us, dynamic_j = packed(settled(timed, LOWEST * highest, highest, header.power_cap_w).clock_mhz)
    power_us = 1e6 * dynamic_j / (header.power_cap_w - header.static_w)
    return {
        "power": power_us,
        **{f"{lane} lane": problem.lane_us(lane) for lane in problem.lanes},
        "packing": packing_us,
    }


def packing_bound_us(problem: Problem, contention: Contention) -> float:
    """The least time in which all tasks get their work done if they may be stopped, resumed and reordered at will.

    `contention` is of whole tasks: to cut one is free here. Each moment runs at most one task of a lane, under shares
    that may run beside each other; the program chooses how long each such combination lasts.

    Raises:
        Infeasible: a task without a share that may run.
    """
    sides: list[list[tuple[NanoTask, Choice] | None]] = []
    for lane in problem.lanes:
        whole = [NanoTask(task.name, 0, problem.chunks) for task in problem.tasks if task.lane == lane]
        sides.append([None, *((nano, choice) for nano in whole for choice in contention.choices[nano])])
    together = [running for row in product(*sides) if (running := [r for r in row if r]) and _may(running, contention)]

    program = Program()
    lasts = [program.real() for _ in together]
    for task in problem.tasks:
        done = total(
            lasts[k] * (1 / _duration_us(choice, nano, running, contention))
            for k, running in enumerate(together)
            for nano, choice in running
            if nano.task == task.name
        )
        program.subject_to(f"(1) {task.name} is done", done.equals(1))
    return program.minimize(total(lasts)).objective


def _may(running: list[tuple[NanoTask, Choice]], contention: Contention) -> bool:
    pairs = combinations((Side(nano.task, choice.sms) for nano, choice in running), 2)
    measured = all((a, b) in contention.slowdown and (b, a) in contention.slowdown for a, b in pairs)
    caps = [choice.sms for _, choice in running]
    return measured and (None in caps or sum(sms or 0 for sms in caps) <= contention.device_sms)


def _duration_us(
    choice: Choice, nano: NanoTask, running: list[tuple[NanoTask, Choice]], contention: Contention
) -> float:
    me = Side(nano.task, choice.sms)
    others = (Side(other.task, beside.sms) for other, beside in running if other != nano)
    return choice.duration_us * (1 + sum(contention.slowdown[me, side] - 1 for side in others))
