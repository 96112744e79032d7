"""Search on A100-like tables: does the paper's pipeline come out? Writes results/search_a100_NAME.json and .svg.

    PYTHONPATH=tests/support python benchmarks/search_a100.py --name 70b      # LLaMA-2-70B TP 8, 2,048 tokens
    PYTHONPATH=tests/support python benchmarks/search_a100.py --name 8b       # Llama-3-8B on one, 1,024 tokens

Predictions from published times and tables, not measurements.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import a100
import msgspec
from nanoflow_search.bound import packing_bound_us
from nanoflow_search.cost_model import Workload
from nanoflow_search.layer import layer_problem, schedule_of
from nanoflow_search.measured import Measured
from nanoflow_search.planner import TURNS, Plan, find_plans
from nanoflow_search.problem import Problem
from nanoflow_search.stage_one import stage_one
from nanoflow_search.timeline import draw

from nanoflow_backend.commands import result
from nanoflow_backend.config import ModelConfig
from nanoflow_backend.models.model import build
from nanoflow_backend.schedule.validate import validate

HERE = Path(__file__).parent
CASES = {  # model, ranks, times, tokens, tokens of a chunk
    "70b": ("llama-2-70b", 8, a100.LLAMA_2_70B_TP8, 2048, 256),
    "8b": ("llama-3-8b", 1, a100.LLAMA_3_8B, 1024, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=CASES, required=True)
    parser.add_argument("--tables", choices=("published", "release"), default="published")
    parser.add_argument("--workload", default="512/512")
    parser.add_argument("--time-limit-s", type=float, default=100.0, help="of each program")
    parser.add_argument("--turns", type=int, default=TURNS, help="of the two stages, for each number of parts")
    options = parser.parse_args()
    folder, ranks, times_us, tokens, chunk_tokens = CASES[options.name]
    model = build(ModelConfig.from_pretrained(HERE / "models" / folder), ranks)
    tables = {"published": a100.PUBLISHED, "release": a100.RELEASE}[options.tables]
    measured = Measured(
        a100.profile(model.layer, ranks, times_us, tables), Workload.parse(options.workload).mix(tokens)
    )

    begun = time.monotonic()
    problem = layer_problem(model.layer, ranks, tokens, chunk_tokens, measured.times)
    plans = find_plans(
        problem, measured, chunk_tokens, turns=options.turns, time_limit_s=options.time_limit_s, progress=print
    )
    wall_s = time.monotonic() - begun
    best = plans[0]
    schedule = schedule_of(model.layer, problem, best.shares.timeline, chunk_tokens, best.shares.sms)
    validate(schedule, model.layer, model.num_layers, a100.SMS)
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
        "packing_bound_us": round(bound_us(problem, measured, chunk_tokens), 1),
        "plans": [describe(problem, plan, chunk_tokens) for plan in plans],
        "schedule": msgspec.to_builtins(schedule),
    }
    suffix = "" if options.tables == "published" else f"_{options.tables}"
    output = HERE / "results" / f"search_a100_{options.name}{suffix}.json"
    result.write(described, output)
    output.with_suffix(".svg").write_text(draw(problem, best.shares, a100.SMS, chunk_tokens))


def bound_us(problem: Problem, measured: Measured, chunk_tokens: int) -> float:
    whole = stage_one(problem, {task.name: 1 for task in problem.tasks})
    return packing_bound_us(problem, measured.contention(problem, whole, chunk_tokens))


def describe(problem: Problem, plan: Plan, chunk_tokens: int) -> dict[str, Any]:
    placed = plan.shares.timeline.placed
    return {
        "predicted_us": round(plan.predicted_us, 1),
        "gain": round(plan.gain, 4),
        "stage_one_gap": round(plan.stage_one_gap, 4),
        "stage_two_gap": round(plan.shares.timeline.gap, 4),
        "parts": {task.name: sum(p.nano.task == task.name for p in placed) for task in problem.tasks},
        "nano_operations": [
            {
                "task": p.nano.task,
                "lane": problem[p.nano.task].lane,
                "tokens": [p.nano.start * chunk_tokens, p.nano.stop * chunk_tokens],
                "start_us": round(p.start_us, 1),
                "duration_us": round(p.duration_us, 1),
                "layers_ahead": p.layers_ahead,
                "sms": plan.shares.sms[p.nano],
            }
            for p in placed
        ],
    }


if __name__ == "__main__":
    main()
