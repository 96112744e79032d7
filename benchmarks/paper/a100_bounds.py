"""Bounds of the gain on A100-like tables: no plan exceeds them whose tasks are cut into so many parts."""

from __future__ import annotations

from itertools import combinations, pairwise

from nanoflow_search.plan.bound import packing_bound_us
from nanoflow_search.plan.contention import Contention, measured_contention
from nanoflow_search.plan.two_stages import sequential_assignment

from benchmarks.paper.a100_case import TILE, Setting, gain
from benchmarks.paper.piece import attention_of

CUTS = ((2, 2), (3, 2), (2, 3), (3, 3))  # parts up to attention, and after it


def gain_bounds(at: Setting) -> dict[str, float]:
    """Return the bounds by how many parts there are of tasks up to attention, and of those after it."""
    attention = attention_of(at.fine)
    before = {name for d in at.fine.dependencies if d.pages for name in (d.writer, d.reader)}
    bounds = {
        f"{front} and {back} parts": {t.name: front if t.name in before else back for t in at.fine.tasks}
        for front, back in CUTS
    }
    found = {name: gain(at, cut_bound_us(at, parts)) for name, parts in bounds.items()}
    of_paper = bounds["3 and 2 parts"]
    return found | {f"3 and 2 parts, {attention} with decodes in each": gain(at, cut_bound_us(at, of_paper, True))}


def cut_bound_us(at: Setting, parts: dict[str, int], all_decode: bool = False) -> float:
    """Return the packing bound with each task as long as its parts are together, where it is cut cheapest.

    With `all_decode` each part of attention has at least one decode, and the cost of a launch.
    """
    problem, measured = at.fine, at.measured
    contention = measured_contention(measured, problem, sequential_assignment(problem).timeline, TILE)
    choices = {}
    for nano, alone in contention.choices.items():
        task = problem[nano.task]
        us = task.duration_us
        cuts = combinations(range(1, problem.chunks), parts.get(nano.task, 1) - 1)
        cheapest_us = min(sum(us[r] for r in pairwise((0, *cut, problem.chunks))) for cut in cuts)
        if all_decode and nano.task == attention_of(problem):
            cheapest_us = us[0, problem.chunks] + (parts[nano.task] - 1) * launch_us(at, task.operations)
        longer = cheapest_us / us[0, problem.chunks]
        choices[nano] = tuple(choice._replace(duration_us=longer * choice.duration_us) for choice in alone)
    return packing_bound_us(problem, Contention(contention.device_sms, choices, contention.slowdown))


def launch_us(at: Setting, operations: tuple[str, ...]) -> float:
    """Return how much more decodes take in two launches than in one; times are straight lines, so any cut will do."""
    whole, half = (
        sum(at.measured.duration_us(*load, None) for load in at.measured.loads(operations, 0, rows, rows))
        for rows in (2 * TILE, TILE)
    )
    return 2 * half - whole
