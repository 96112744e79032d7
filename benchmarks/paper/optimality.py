"""Both stages of the search are compared with exhaustion on random small problems.

    python -m benchmarks search-optimality --instances 240

Writes benchmarks/results/search_optimality.json, instance by instance, and continues one that is there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from nanoflow_search.plan.stage_one import stage_one
from nanoflow_search.plan.stage_two import stage_two

from benchmarks.paper import exhaustive_orders, exhaustive_shares
from benchmarks.paper.random_problems import random_contention, random_problem
from nanoflow_backend.bench import result

OUTPUT = Path(__file__).parents[1] / "results" / "search_optimality.json"
TOLERANCE = 1e-5  # HiGHS keeps constraints to 1e-6


def main(instances: Annotated[int, typer.Option(help="How many problems.")] = 240) -> None:
    """Compare both stages with exhaustion on random small problems."""
    done: list[dict[str, Any]] = json.loads(OUTPUT.read_text())["instances"] if OUTPUT.exists() else []
    for seed in range(len(done), instances):
        done.append(compare(seed))
        equal = {stage: sum(agree(d[stage]) for d in done) for stage in ("stage_one", "stage_two")}
        result.write({"of": len(done), "equal": equal, "tolerance": TOLERANCE, "instances": done}, OUTPUT)
        print(done[-1], flush=True)


def compare(seed: int) -> dict[str, Any]:
    """The optima of problem `seed`, and of shares for the plan that stage one found for it."""
    problem, parts = random_problem(seed)
    size = {"tasks": len(problem.tasks), "lanes": len(problem.lanes), "chunks": problem.chunks}
    begun = time.process_time()
    ordered = stage_one(problem, parts)
    solved = time.process_time()
    exhausted_us = exhaustive_orders.shortest_period_us(problem, parts)
    first = {
        "solver_us": round(ordered.period_us, 4),
        "exhaustion_us": round(exhausted_us, 4),
        "solver_cpu_s": round(solved - begun, 3),
        "exhaustion_cpu_s": round(time.process_time() - solved, 3),
    }
    if len(ordered.placed) > 6:  # of these exhaustion takes too long: shares for the plan of whole tasks
        ordered = stage_one(problem, dict.fromkeys(parts, 1))
    contention = random_contention(seed, problem, ordered)
    begun = time.process_time()
    shares = stage_two(problem, ordered, contention)
    solved = time.process_time()
    exhausted_us = exhaustive_shares.shortest_period_us(problem, ordered, contention)
    second = {
        "nano_tasks": len(ordered.placed),
        "solver_us": round(shares.timeline.period_us, 4),
        "exhaustion_us": round(exhausted_us, 4),
        "solver_cpu_s": round(solved - begun, 3),
        "exhaustion_cpu_s": round(time.process_time() - solved, 3),
    }
    return {"seed": seed, **size, "stage_one": first, "stage_two": second}


def agree(found: dict[str, float]) -> bool:
    return bool(abs(found["solver_us"] - found["exhaustion_us"]) <= TOLERANCE * found["exhaustion_us"])


if __name__ == "__main__":
    typer.run(main)
