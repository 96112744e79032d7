"""Search on A100-like tables: does the paper's pipeline come out? Writes results/search_a100_NAME.json and .svg.

    PYTHONPATH=tests/support python benchmarks/search_a100.py --name 70b      # LLaMA-2-70B TP 8, 2,048 tokens
    PYTHONPATH=tests/support python benchmarks/search_a100.py --name 8b       # Llama-3-8B on one, 1,024 tokens

The two programs for some numbers of parts, each task with one share for all of its time; then the best of their plans,
annealed with GEMMs that keep what the others leave (`a100.Published`).
Predictions from published times and tables, not measurements.
"""

from __future__ import annotations

import argparse
import time
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import a100
import msgspec
from nanoflow_search.anneal import Fluid, Pieces, anneal, pieces_of
from nanoflow_search.bound import packing_bound_us
from nanoflow_search.cost_model import Workload
from nanoflow_search.layer import layer_problem, schedule_of
from nanoflow_search.measured import Measured
from nanoflow_search.planner import Plan, find_plans, one_after_the_other
from nanoflow_search.predict import predict
from nanoflow_search.problem import NanoTask, Problem
from nanoflow_search.stage_two import Contention, Shares
from nanoflow_search.timeline import draw

from nanoflow_backend.commands import result
from nanoflow_backend.config import ModelConfig
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.presets import sequential
from nanoflow_backend.schedule.validate import validate

HERE = Path(__file__).parent
CASES = {  # model, ranks, times, tokens, tokens of a chunk
    "70b": ("llama-2-70b", 8, a100.LLAMA_2_70B_TP8, 2048, 256),
    "8b": ("llama-3-8b", 1, a100.LLAMA_3_8B, 1024, 128),
}
TILE = 128  # tokens: what annealing cuts at multiples of
PARTS = ((2, 2), (3, 2), (2, 3), (3, 3))  # up to attention, and after it
SEEDS = 6  # how often the best plan of each of them is annealed
TENTHS = tuple(round(tenth * a100.SMS / 10) for tenth in range(1, 11))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=CASES, required=True)
    parser.add_argument("--tables", choices=("published", "release"), default="published")
    parser.add_argument("--workload", default="512/512")
    parser.add_argument("--time-limit-s", type=float, default=10.0, help="of each program")
    parser.add_argument("--turns", type=int, default=4, help="of the two stages, for each number of parts")
    parser.add_argument("--steps", type=int, default=50_000, help="of annealing, each time")
    options = parser.parse_args()
    folder, ranks, times_us, tokens, chunk_tokens = CASES[options.name]
    model = build(ModelConfig.from_pretrained(HERE / "models" / folder), ranks)
    tables = {"published": a100.PUBLISHED, "release": a100.RELEASE}[options.tables]
    measured = a100.Published(
        a100.profile(model.layer, ranks, times_us, tables), Workload.parse(options.workload).mix(tokens)
    )

    begun = time.monotonic()
    problem = layer_problem(model.layer, ranks, tokens, chunk_tokens, measured.times)
    fine = layer_problem(model.layer, ranks, tokens, TILE, measured.times)
    fluid = Fluid(fine, measured, TILE)
    sms = {task.name: (None,) if task.lane == "compute" else TENTHS for task in fine.tasks}
    searched: list[dict[str, Any]] = []
    annealed: list[Shares] = []
    for parts in PARTS:
        plans = find_plans(
            problem,
            measured,
            chunk_tokens,
            parts=(parts,),
            turns=options.turns,
            time_limit_s=options.time_limit_s,
            progress=print,
        )
        for plan in plans[:1]:
            pieces = released(fine, pieces_of(plan.shares, chunk_tokens // TILE))
            found = [anneal(fine, measured, pieces, sms, TILE, steps=options.steps, seed=seed) for seed in range(SEEDS)]
            searched.append(summary(fine, plan, fluid.period_us(pieces), found))
            print(searched[-1])
            annealed += found
    wall_s = time.monotonic() - begun
    best = min(annealed, key=lambda shares: shares.timeline.period_us)
    schedule = schedule_of(model.layer, fine, best.timeline, TILE, best.sms)
    validate(schedule, model.layer, model.num_layers, a100.SMS)
    one, whole = (predict(s, measured, model.num_layers).layer_us for s in (sequential(model.layer, tokens), schedule))
    described = {
        "model": folder,
        "tensor_parallel": ranks,
        "dense_batch_tokens": tokens,
        "workload": options.workload,
        "tables": options.tables,
        "kind": "prediction from published times of an A100, nothing measured",
        "search_wall_s": round(wall_s, 1),
        "sequential_us": round(problem.sequential_us(), 1),
        "compute_lane_us": round(problem.lane_us("compute"), 1),
        "packing_bound_us": round(cut_bound_us(fine, measured, {}), 1),
        "gain_bounds": gain_bounds(fine, measured),
        "gain": round(fine.sequential_us() / best.timeline.period_us, 4),
        "gain_all_layers": round(one / whole, 4),
        "searched": searched,
        "best": describe(fine, best),
        "schedule": msgspec.to_builtins(schedule),
    }
    suffix = "" if options.tables == "published" else f"_{options.tables}"
    output = HERE / "results" / f"search_a100_{options.name}{suffix}.json"
    result.write(described, output)
    output.with_suffix(".svg").write_text(draw(fine, best, a100.SMS, TILE))


def released(problem: Problem, pieces: Pieces) -> Pieces:
    """GEMMs without a cap: they keep what the others leave. The others have one, if it is all of the device."""
    return tuple(p._replace(sms=None if problem[p.nano.task].lane == "compute" else p.sms or a100.SMS) for p in pieces)


def gain_bounds(problem: Problem, measured: Measured) -> dict[str, float]:
    """What no plan exceeds: by how many parts there are of tasks up to attention, and of those after it."""
    before = {name for d in problem.dependencies if d.pages for name in (d.writer, d.reader)}
    return {
        f"{front} and {back} parts": round(
            problem.sequential_us()
            / cut_bound_us(problem, measured, {t.name: front if t.name in before else back for t in problem.tasks}),
            4,
        )
        for front, back in PARTS
    }


def cut_bound_us(problem: Problem, measured: Measured, parts: dict[str, int]) -> float:
    """The packing bound, with each task as long as its parts are together, where it is cut cheapest."""
    contention = measured.contention(problem, one_after_the_other(problem).timeline, TILE)
    choices = {}
    for nano, alone in contention.choices.items():
        us = problem[nano.task].duration_us
        cuts = combinations(range(1, problem.chunks), parts.get(nano.task, 1) - 1)
        cheapest_us = min(sum(us[r] for r in pairwise((0, *cut, problem.chunks))) for cut in cuts)
        longer = cheapest_us / us[0, problem.chunks]
        choices[nano] = tuple(choice._replace(duration_us=longer * choice.duration_us) for choice in alone)
    return packing_bound_us(problem, Contention(contention.device_sms, choices, contention.slowdown))


def parts_of(problem: Problem, nanos: list[NanoTask]) -> dict[str, int]:
    return {task.name: sum(nano.task == task.name for nano in nanos) for task in problem.tasks}


def summary(problem: Problem, plan: Plan, fluid_us: float, found: list[Shares]) -> dict[str, Any]:
    """A plan of the two programs, the same in the fluid simulation, and what came of it."""
    return {
        "parts": parts_of(problem, [p.nano for p in plan.shares.timeline.placed]),
        "stage_one_gap": round(plan.stage_one_gap, 4),
        "stage_two_gap": round(plan.shares.timeline.gap, 4),
        "gain": round(plan.gain, 4),
        "fluid_gain": round(plan.sequential_us / fluid_us, 4),
        "annealed": [
            {
                "gain": round(plan.sequential_us / shares.timeline.period_us, 4),
                "parts": parts_of(problem, [p.nano for p in shares.timeline.placed]),
            }
            for shares in found
        ],
    }


def describe(problem: Problem, shares: Shares) -> dict[str, Any]:
    placed = shares.timeline.placed
    return {
        "predicted_us": round(shares.timeline.period_us, 1),
        "parts": parts_of(problem, [p.nano for p in placed]),
        "nano_operations": [
            {
                "task": p.nano.task,
                "lane": problem[p.nano.task].lane,
                "tokens": [p.nano.start * TILE, p.nano.stop * TILE],
                "start_us": round(p.start_us, 1),
                "duration_us": round(p.duration_us, 1),
                "layers_ahead": p.layers_ahead,
                "sms": shares.sms[p.nano],
            }
            for p in placed
        ],
    }


if __name__ == "__main__":
    main()
