"""Simulated annealing improves a plan of the two stages by random moves, judged by the fluid simulation.

Stage two charges interference for a task's whole duration; stage one gives tasks common cuts. The simulation has
neither restriction.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

from nanoflow_search.plan.problem import Problem
from nanoflow_search.plan.stage_two import ShareAssignment
from nanoflow_search.predict.timing_model import TimingModel

from benchmarks.paper.fluid import Fluid
from benchmarks.paper.moves import Moves
from benchmarks.paper.piece import Parts, Pieces, attention_of, divided

HOT, COLD = 0.01, 0.0002  # temperatures at first and at last, as shares of the period


def anneal(
    problem: Problem,
    measured: TimingModel,
    pieces: Pieces,
    sms: Mapping[str, Sequence[int | None]],
    chunk_tokens: int,
    *,
    steps: int,
    seed: int = 0,
    parts: Mapping[str, Parts] | None = None,
    heat: tuple[float, float] = (HOT, COLD),
) -> ShareAssignment:
    """Return the best plan on a random path of `steps` moves from `pieces`, cut to have the `parts` asked for.

    `sms` holds the shares that each task may have, in ascending order; `heat` the first and the last temperature.

    Raises:
        ValueError: `pieces` wait for each other, or cannot have such parts.
    """
    fluid = Fluid(problem, measured, chunk_tokens)
    rng = random.Random(seed)
    moves = Moves(problem, sms, parts or {}, chunk_tokens, rng)
    hot, cold = heat
    best = here = divided(pieces, parts or {}, attention_of(problem))
    best_us = here_us = fluid.period_us(best)
    if best_us == math.inf:
        raise ValueError("pieces: expected a plan whose nano-tasks follow what they read")
    for step in range(steps):
        heat_us = best_us * hot * (cold / hot) ** (step / steps)
        changed = moves.one(here)
        if changed is None or changed == here:
            continue
        changed_us = fluid.period_us(changed)
        if changed_us < here_us or rng.random() < math.exp((here_us - changed_us) / heat_us):
            here, here_us = changed, changed_us
            if here_us < best_us:
                best, best_us = here, here_us
    return fluid.shares(best)
