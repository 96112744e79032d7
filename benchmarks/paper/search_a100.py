"""The search on A100-like tables answers whether the paper's pipeline comes out.

It writes benchmarks/results/search_a100_NAME.json and .svg.

    python -m benchmarks search-a100 --name 70b      # LLaMA-2-70B TP 8, 2,048 tokens
    python -m benchmarks search-a100 --name 70b --tables release --goals paper --spare qkv
    python -m benchmarks search-a100 --name 8b       # Llama-3-8B on one, 1,024 tokens

The two stages plan for some numbers of parts, each task with one share for all of its time. Then the best of their
plans are annealed with GEMMs that keep what the others leave (`a100_tables.Published`): once with any parts, and once
with those of the paper's pipeline (`PAPER`), also from that pipeline. Two processes work. All figures are predictions
from published times and tables, and no measurements.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from nanoflow_search.checkpoint import Run
from nanoflow_search.emit.picture import draw_period
from nanoflow_search.plan.op_graph import schedule_of
from nanoflow_search.plan.stage_two import ShareAssignment
from nanoflow_search.plan.two_stages import LayerPlan, find_plans
from nanoflow_search.predict.predict import predict
from nanoflow_search.request import Effort

from benchmarks.paper import a100_tables as a100
from benchmarks.paper.a100_bounds import CUTS, cut_bound_us, gain_bounds
from benchmarks.paper.a100_case import CASES, TENTHS, TILE, Case, Setting, fluid_of, gain, pipeline, released, setting
from benchmarks.paper.anneal import COLD, HOT, anneal
from benchmarks.paper.piece import Parts, Pieces, attention_of
from nanoflow_backend.bench import result
from nanoflow_backend.schedule.validate import validate

RESULTS = Path(__file__).parents[1] / "results"
PROCESSES = 2

FEW, SOME = Parts(1, 3), Parts(1, 5)
ANY = {"qkv": FEW, "attention": SOME, "o": FEW, "attention_reduce": FEW, "gate_up": FEW, "mlp_reduce": FEW}
# KQV and the attention of decodes finer than O, UG and D.
PAPER = ANY | {"qkv": Parts(3, 4), "attention": Parts(3, 6), "o": Parts(1, 2), "gate_up": Parts(1, 2)}
GOALS = {"any": ANY, "paper": PAPER, "kqv": PAPER | {"attention": Parts(2, 6)}}  # the last: KQV alone finer

Name, Tables = Literal["70b", "8b"], Literal["published", "release"]


def main(
    name: Annotated[Name, typer.Option(help="70b: LLaMA-2-70B TP 8, 2,048 tokens; 8b: Llama-3-8B on one GPU, 1,024.")],
    tables: Annotated[Tables, typer.Option(help="Of R to P: the paper's, or the later release's.")] = "published",
    workload: Annotated[str, typer.Option(help="Mean prompt/output tokens.")] = "512/512",
    time_limit_s: Annotated[float, typer.Option(help="Time limit of each program.")] = 10.0,
    turns: Annotated[int, typer.Option(help="Runs of the two stages for each number of parts.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of each annealing.")] = 200_000,
    runs: Annotated[int, typer.Option(help="Annealings, from one start after the other.")] = 12,
    goals: Annotated[
        list[str] | None, typer.Option(help="Which parts to ask for. Repeatable; default: any, and the paper's.")
    ] = None,
    spare: Annotated[
        str | None, typer.Option(help="What if three launches of this operation cost as much as two?")
    ] = None,
) -> None:
    """Search on the published tables of an A100; predictions, not measurements."""
    if unknown := set(goals or []) - GOALS.keys():
        raise typer.BadParameter(f"expected any of {', '.join(GOALS)}, got {', '.join(sorted(unknown))}")
    case = Case(name, tables, workload, spare)
    at = setting(case)

    begun = time.monotonic()
    with ProcessPoolExecutor(PROCESSES) as pool:
        programs = list(pool.map(partial(planned, case, turns, time_limit_s), CUTS))
        starts = [released(at.fine, fluid_of(at).pieces(p.shares, at.chunk_tokens // TILE)) for p in programs]
        found = {}
        for goal in goals or (("any", "paper") if name == "70b" else ("any",)):
            some = starts if goal == "any" else [pipeline(at), *starts[:2]]  # of two parts after attention
            found[goal] = annealed(pool, case, GOALS[goal], some, runs, steps)
    wall_s = time.monotonic() - begun

    described = {
        "model": CASES[name][0],
        "tensor_parallel": CASES[name][1],
        "dense_batch_tokens": at.tokens,
        "workload": workload,
        "tables": tables,
        "kind": "prediction from published times of an A100, nothing measured",
        "search_wall_s": round(wall_s, 1),
        "processes": PROCESSES,
        **({"spared": spare} if spare else {}),
        "sequential_us": round(at.sequential_us, 1),
        "compute_lane_us": round(at.fine.lane_us("compute"), 1),
        "packing_bound_us": round(cut_bound_us(at, {}), 1),
        "gain_bounds": gain_bounds(at),
        "programs": [
            {**summary(at, plan), "fluid_gain": gain(at, fluid_of(at).period_us(start))}
            for plan, start in zip(programs, starts, strict=True)
        ],
        "pipeline_gain": gain(at, fluid_of(at).period_us(pipeline(at))) if name == "70b" else None,
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
    named = [name, *([] if tables == "published" else [tables]), *(goals or [])]
    named += ["spare", spare.replace("/", "_")] if spare else []
    output = RESULTS / f"search_a100_{'_'.join(named)}.json"
    result.write(described, output)
    for goal, plans in found.items():
        picture = output.with_name(f"{output.stem}{'' if goal == [*found][-1] else '_' + goal}.svg")
        best = best_of(plans)
        picture.write_text(draw_period(at.fine, best, a100.SMS, TILE))
        print(f"{goal}: {gain(at, period_us(best))}x, {parts_of(at, best)}, {wall_s:.0f} s")


# the search


def planned(case: Case, turns: int, time_limit_s: float, cuts: tuple[int, int]) -> LayerPlan:
    """Return the best plan of the two stages with at most so many parts. Raises: ValueError, none was found in time."""
    at, effort = setting(case), Effort(turns=turns, time_limit_s=time_limit_s)
    found = find_plans(at.coarse, at.measured, at.chunk_tokens, effort, Run(say=print), part_limits=(cuts,))
    if not found:
        raise ValueError(f"no plan of {cuts} parts in {time_limit_s:g} s a program; raise --time-limit-s")
    return found[0]


def annealed(
    pool: ProcessPoolExecutor,
    case: Case,
    parts: dict[str, Parts],
    starts: list[Pieces],
    runs: int,
    steps: int,
) -> list[ShareAssignment]:
    """Some runs from each start in turn; then the best once more, from less heat."""
    at = setting(case)
    first = [pool.submit(one, case, parts, starts[run % len(starts)], steps, run, HOT) for run in range(runs)]
    found = sorted((job.result() for job in first), key=period_us)
    warm = [fluid_of(at).pieces(shares) for shares in found[:PROCESSES]]
    again = [pool.submit(one, case, parts, pieces, steps, run, HOT / 4) for run, pieces in enumerate(warm)]
    return [*found, *(job.result() for job in again)]


def one(case: Case, parts: dict[str, Parts], pieces: Pieces, steps: int, seed: int, hot: float) -> ShareAssignment:
    at = setting(case)
    sms = {task.name: (None,) if task.lane == "compute" else TENTHS for task in at.fine.tasks}
    known = asked(at, parts)
    found = anneal(at.fine, at.measured, pieces, sms, TILE, steps=steps, seed=seed, parts=known, heat=(hot, COLD))
    print(f"{gain(at, period_us(found)):.4f}x: {parts_of(at, found)}", flush=True)
    return found


def asked(at: Setting, parts: dict[str, Parts]) -> dict[str, Parts]:
    """Of the tasks that there are."""
    return {task.name: parts[task.name] for task in at.fine.tasks}


def period_us(shares: ShareAssignment) -> float:
    return shares.timeline.period_us


def best_of(plans: list[ShareAssignment]) -> ShareAssignment:
    return min(plans, key=period_us)


# what the result says


def parts_of(at: Setting, shares: ShareAssignment) -> dict[str, int]:
    return {task.name: sum(p.nano.task == task.name for p in shares.timeline.placed) for task in at.fine.tasks}


def summary(at: Setting, plan: LayerPlan) -> dict[str, Any]:
    """A plan of the two programs."""
    return {
        "parts": parts_of(at, plan.shares),
        "stage_one_gap": round(plan.stage_one_gap, 4),
        "stage_two_gap": round(plan.shares.timeline.gap, 4),
        "gain": round(plan.gain, 4),
    }


def describe(at: Setting, shares: ShareAssignment) -> dict[str, Any]:
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
    typer.run(main)
