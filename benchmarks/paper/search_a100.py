"""Search on A100-like tables: does the paper's pipeline come out? Writes results/search_a100_NAME.json and .svg.

    python -m benchmarks.paper.search_a100 --name 70b      # LLaMA-2-70B TP 8, 2,048 tokens
    python -m benchmarks.paper.search_a100 --name 70b --tables release --goals paper --spare qkv
    python -m benchmarks.paper.search_a100 --name 8b       # Llama-3-8B on one, 1,024 tokens

The two programs for some numbers of parts, each task with one share for all of its time; then the best of their plans,
annealed with GEMMs that keep what the others leave (`a100.Published`): once with any parts, and once with those of the
paper's pipeline (`PAPER`), from that pipeline too. Two processes.
Predictions from published times and tables, not measurements.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from nanoflow_search.emit.picture import draw
from nanoflow_search.plan.op_graph import schedule_of
from nanoflow_search.plan.stage_two import Shares
from nanoflow_search.plan.two_stages import Plan, find_plans
from nanoflow_search.predict.predict import predict

from benchmarks.paper import a100_tables as a100
from benchmarks.paper.a100_bounds import CUTS, cut_bound_us, gain_bounds
from benchmarks.paper.a100_case import CASES, TENTHS, TILE, Case, Setting, fluid_of, gain, pipeline, released, setting
from benchmarks.paper.anneal import COLD, HOT, anneal
from benchmarks.paper.piece import Parts, Pieces, attention_of
from nanoflow_backend.bench import result
from nanoflow_backend.schedule.validate import validate

HERE = Path(__file__).parent
PROCESSES = 2

FEW, SOME = Parts(1, 3), Parts(1, 5)
ANY = {"qkv": FEW, "attention": SOME, "o": FEW, "attention_reduce": FEW, "gate_up": FEW, "mlp_reduce": FEW}
# KQV and the attention of decodes finer than O, UG and D.
PAPER = ANY | {"qkv": Parts(3, 4), "attention": Parts(3, 6), "o": Parts(1, 2), "gate_up": Parts(1, 2)}
GOALS = {"any": ANY, "paper": PAPER, "kqv": PAPER | {"attention": Parts(2, 6)}}  # the last: KQV alone finer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", choices=CASES, required=True)
    parser.add_argument("--tables", choices=("published", "release"), default="published")
    parser.add_argument("--workload", default="512/512")
    parser.add_argument("--time-limit-s", type=float, default=10.0, help="of each program")
    parser.add_argument("--turns", type=int, default=2, help="of the two stages, for each number of parts")
    parser.add_argument("--steps", type=int, default=200_000, help="of annealing, each time")
    parser.add_argument("--runs", type=int, default=12, help="of annealing, from one start after the other")
    parser.add_argument(
        "--goals", nargs="+", choices=GOALS, help="which parts to ask for; by default any, and the paper's"
    )
    parser.add_argument("--spare", help="an operation of which three launches are to cost as much as two: what if?")
    options = parser.parse_args()
    case = Case(options.name, options.tables, options.workload, options.spare)
    at = setting(case)

    begun = time.monotonic()
    with ProcessPoolExecutor(PROCESSES) as pool:
        programs = list(pool.map(partial(planned, case, options.turns, options.time_limit_s), CUTS))
        starts = [released(at.fine, fluid_of(at).pieces(p.shares, at.chunk_tokens // TILE)) for p in programs]
        found = {}
        for goal in options.goals or (("any", "paper") if options.name == "70b" else ("any",)):
            some = starts if goal == "any" else [pipeline(at), *starts[:2]]  # of two parts after attention
            found[goal] = annealed(pool, case, GOALS[goal], some, options.runs, options.steps)
    wall_s = time.monotonic() - begun

    described = {
        "model": CASES[options.name][0],
        "tensor_parallel": CASES[options.name][1],
        "dense_batch_tokens": at.tokens,
        "workload": options.workload,
        "tables": options.tables,
        "kind": "prediction from published times of an A100, nothing measured",
        "search_wall_s": round(wall_s, 1),
        "processes": PROCESSES,
        **({"spared": options.spare} if options.spare else {}),
        "sequential_us": round(at.sequential_us, 1),
        "compute_lane_us": round(at.fine.lane_us("compute"), 1),
        "packing_bound_us": round(cut_bound_us(at, {}), 1),
        "gain_bounds": gain_bounds(at),
        "programs": [
            {**summary(at, plan), "fluid_gain": gain(at, fluid_of(at).period_us(start))}
            for plan, start in zip(programs, starts, strict=True)
        ],
        "pipeline_gain": gain(at, fluid_of(at).period_us(pipeline(at))) if options.name == "70b" else None,
        "found": {
            goal: {
                "asked": {task: parts._asdict() for task, parts in asked(at, GOALS[goal]).items()},
                "annealed": [
                    {"gain": gain(at, shares.timeline.period_us), "parts": parts_of(at, shares)} for shares in plans
                ],
                **describe(at, best_of(plans)),
            }
            for goal, plans in found.items()
        },
    }
    named = [options.name, *([] if options.tables == "published" else [options.tables]), *(options.goals or [])]
    named += ["spare", options.spare.replace("/", "_")] if options.spare else []
    output = HERE.parent / "results" / f"search_a100_{'_'.join(named)}.json"
    result.write(described, output)
    for goal, plans in found.items():
        picture = output.with_name(f"{output.stem}{'' if goal == [*found][-1] else '_' + goal}.svg")
        best = best_of(plans)
        picture.write_text(draw(at.fine, best, a100.SMS, TILE))
        print(f"{goal}: {gain(at, period_us(best))}x, {parts_of(at, best)}, {wall_s:.0f} s")


# the search


def planned(case: Case, turns: int, time_limit_s: float, cuts: tuple[int, int]) -> Plan:
    at = setting(case)
    return find_plans(
        at.coarse, at.measured, at.chunk_tokens, parts=(cuts,), turns=turns, time_limit_s=time_limit_s, progress=print
    )[0]


def annealed(
    pool: ProcessPoolExecutor,
    case: Case,
    parts: dict[str, Parts],
    starts: list[Pieces],
    runs: int,
    steps: int,
) -> list[Shares]:
    """Some runs from each start in turn; then the best once more, from less heat."""
    at = setting(case)
    first = [pool.submit(one, case, parts, starts[run % len(starts)], steps, run, HOT) for run in range(runs)]
    found = sorted((job.result() for job in first), key=period_us)
    warm = [fluid_of(at).pieces(shares) for shares in found[:PROCESSES]]
    again = [pool.submit(one, case, parts, pieces, steps, run, HOT / 4) for run, pieces in enumerate(warm)]
    return [*found, *(job.result() for job in again)]


def one(case: Case, parts: dict[str, Parts], pieces: Pieces, steps: int, seed: int, hot: float) -> Shares:
    at = setting(case)
    sms = {task.name: (None,) if task.lane == "compute" else TENTHS for task in at.fine.tasks}
    known = asked(at, parts)
    found = anneal(at.fine, at.measured, pieces, sms, TILE, steps=steps, seed=seed, parts=known, heat=(hot, COLD))
    print(f"{gain(at, period_us(found)):.4f}x: {parts_of(at, found)}", flush=True)
    return found


def asked(at: Setting, parts: dict[str, Parts]) -> dict[str, Parts]:
    """Of the tasks that there are."""
    return {task.name: parts[task.name] for task in at.fine.tasks}


def period_us(shares: Shares) -> float:
    return shares.timeline.period_us


def best_of(plans: list[Shares]) -> Shares:
    return min(plans, key=period_us)


# what is told of it


def parts_of(at: Setting, shares: Shares) -> dict[str, int]:
    return {task.name: sum(p.nano.task == task.name for p in shares.timeline.placed) for task in at.fine.tasks}


def summary(at: Setting, plan: Plan) -> dict[str, Any]:
    """A plan of the two programs."""
    return {
        "parts": parts_of(at, plan.shares),
        "stage_one_gap": round(plan.stage_one_gap, 4),
        "stage_two_gap": round(plan.shares.timeline.gap, 4),
        "gain": round(plan.gain, 4),
    }


def describe(at: Setting, shares: Shares) -> dict[str, Any]:
    """The plan as a schedule of the engine, and how long that takes with all layers and ramps."""
    layer, placed = at.model.layer, shares.timeline.placed
    schedule = schedule_of(layer, at.fine, shares.timeline, TILE, shares.sms, groups=shares.groups)
    validate(schedule, layer, at.model.num_layers, a100.SMS)
    whole_us = predict(schedule, at.measured, at.model.num_layers).layer_us
    decodes = {p.nano: p.decodes for p in fluid_of(at).pieces(shares)}
    gemms_us = sum(p.duration_us for p in placed if at.fine[p.nano.task].lane == "compute")
    return {
        "gain": gain(at, period_us(shares)),
        "gain_all_layers": gain(at, whole_us),
        "predicted_us": round(period_us(shares), 1),
        "without_gemm_us": round(period_us(shares) - gemms_us, 1),
        "parts": parts_of(at, shares),
        "attention_parts_with_decodes": sum(some > 0 for some in decodes.values()),
        "nano_operations": [
            {
                "task": p.nano.task,
                "lane": at.fine[p.nano.task].lane,
                "tokens": [p.nano.start * TILE, p.nano.stop * TILE],
                **({"decodes": decodes[p.nano]} if p.nano.task == attention_of(at.fine) else {}),
                "start_us": round(p.start_us, 1),
                "duration_us": round(p.duration_us, 1),
                "layers_ahead": p.layers_ahead,
                "sms": shares.sms[p.nano],
            }
            for p in placed
        ],
        "schedule": msgspec.to_builtins(schedule),
    }


if __name__ == "__main__":
    main()
