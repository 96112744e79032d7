"""Random small layers to plan, small enough for exhaustion."""

from __future__ import annotations

import random

from nanoflow_search.plan.contention import Contention, ShareChoice, TaskShare
from nanoflow_search.plan.problem import CyclicTimeline, Problem, Task, TaskDependency

LANES = ("compute", "memory", "network")


def random_problem(seed: int) -> tuple[Problem, dict[str, int]]:
    """2 to 8 tasks in up to 3 lanes on 2 to 4 chunks, and how many parts each may have.

    Every cut costs something (weights are read again), some ranges are not allowed, some tasks read pages. What the
    number of ways to plan would grow too large for exhaustion with has fewer parts.
    """
    rng = random.Random(seed)
    chunks, count = rng.choice([2, 2, 3, 4]), rng.randint(2, 8)
    tasks, names = [], [f"op{i}" for i in range(count)]
    for name in names:
        fixed, slope = rng.randint(1, 9), rng.randint(1, 20)
        durations = {
            (a, b): float(fixed + slope * (b - a) + rng.randint(0, 3))
            for a in range(chunks)
            for b in range(a + 1, chunks + 1)
            if (a, b) == (0, chunks) or rng.random() < 0.9
        }
        tasks.append(Task(name, rng.choice(LANES), durations))
    dependencies = [
        TaskDependency(names[i], names[j], pages=rng.random() < 0.3)
        for j in range(1, count)
        for i in rng.sample(range(j), min(j, rng.choice([1, 1, 2])))
    ]
    dependencies.append(TaskDependency(names[-1], names[0], layers_back=1))
    cut = set(rng.sample(names, 1 if count > 6 else 2 if count > 4 or chunks > 2 else min(count, 3)))
    return Problem(chunks, tuple(tasks), tuple(dependencies)), {n: 2 if n in cut else 1 for n in names}


def random_contention(seed: int, problem: Problem, ordered: CyclicTimeline) -> Contention:
    """Shares of a device of 8 SMs, capped or not, slowdowns on both sides, and often a power cap that binds."""
    rng = random.Random(seed)
    sms = (
        [None, *rng.sample(range(2, 8), 1)] if rng.random() < 0.7 else rng.sample(range(2, 7), 2)
    )  # sharing and owning, or owning alone
    nanos = len(ordered.placed)
    open_choice = rng.sample(range(nanos), min(nanos, 4 if nanos < 6 else 2))
    choices = {}
    for index, p in enumerate(ordered.placed):
        choices[p.nano] = tuple(
            ShareChoice(
                n, p.duration_us * (1 if n is None else rng.uniform(1, 8 / n)), rng.uniform(2, 6) * p.duration_us * 1e-5
            )
            for n in (sms if index in open_choice else rng.sample(sms, 1))
        )
    sides = [TaskShare(task.name, n) for task in problem.tasks for n in sms]
    slowdown = {
        (a, b): rng.choice([1.0, rng.uniform(1, 1.5), rng.uniform(1.2, 2.2)])
        for a in sides
        for b in sides
        if a.task != b.task and (a.sms or 0) + (b.sms or 0) <= 8
    }
    return Contention(8, choices, slowdown, rng.choice([float("inf"), rng.uniform(70, 110)]), 50.0)
