"""The engine is compared with transformers: every architecture x GQA ratio x head_dim, in every way to run it.

The result is a header, and for each checkpoint its totals and the runs that failed. It takes about an hour and a half
of CPU time; a run that was cut goes on where it was.
"""

from __future__ import annotations

import atexit
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.progress import track

from benchmarks.accuracy.against_transformers import (
    DENSE_BATCH_TOKENS,
    MODELS,
    NARROW_GAP,
    OUTPUT_TOKENS,
    RUNS,
    TOLERANCE,
    ParityOutcome,
    run,
)
from nanoflow_backend.bench import result


def main(
    output: Annotated[Path, typer.Option(help="The JSON result; one that is there and unfinished is continued.")],
    processes: Annotated[int, typer.Option(help="Runs at once.")] = 1,
) -> None:
    """Greedy tokens and logits against transformers, in every way to run a step; exits with 1 if any run failed."""
    transformers.utils.logging.disable_progress_bar()
    runs = [dict(zip(RUNS, values, strict=True)) for values in product(*RUNS.values())]
    header = {
        **result.header(),
        "transformers": transformers.__version__,
        "dtype": "float32",
        "dense_batch_tokens": DENSE_BATCH_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "tolerance": TOLERANCE,
        "narrow_gap": NARROW_GAP,
        "runs_of_each_checkpoint": RUNS,
    }
    done = unfinished(output)
    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
    for model in checkpoints():
        if model in [entry["checkpoint"] for entry in done]:
            continue
        outcomes = track(pool.map(partial(run_here, model), runs), model_name(model), len(runs))
        done.append({"checkpoint": model, **summarise_runs(list(zip(runs, outcomes, strict=True)))})
        # After each checkpoint, so that an interrupted run says how far it came and can be continued.
        output.write_text(json.dumps({**header, "of_checkpoints": len(checkpoints()), "done": done}, indent=1) + "\n")
        print(model_name(model), {name: value for name, value in done[-1].items() if name != "checkpoint"}, flush=True)
    sys.exit(any(checkpoint["failed"] for checkpoint in done))


def unfinished(output: Path) -> list[dict[str, Any]]:
    """The checkpoints that a run which was cut has done; none where there is no such run, or a whole one."""
    found = json.loads(output.read_text()) if output.exists() else {"done": []}
    done: list[dict[str, Any]] = found["done"]
    return [] if len(done) == found.get("of_checkpoints") else done


def run_here(model: dict[str, Any], options: dict[str, Any]) -> ParityOutcome:
    """In a process of the pool, which keeps the checkpoints it made."""
    return run(model, options, scratch())


@lru_cache
def scratch() -> Path:
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return Path(folder.name)


def model_name(model: dict[str, Any]) -> str:
    return "-".join(str(value) for value in model.values())


def summarise_runs(outcomes: list[tuple[dict[str, Any], ParityOutcome]]) -> dict[str, Any]:
    split = [o for options, o in outcomes if options["schedule"] != "sequential" and o.steps]
    return {
        "runs": len(outcomes),
        "rows": sum(o.rows for _, o in outcomes),
        "worst_logits_relative_rms": max(o.worst_logits for _, o in outcomes),
        "different_tokens": sum(o.different_tokens for _, o in outcomes),
        "excused_rows": sum(o.excused_rows for _, o in outcomes),
        "least_share_of_split_steps": min(o.split_steps / o.steps for o in split),
        "boundaries_inside_a_chunk": sum(o.split_chunks for o in split),
        "failed": [options | {"failures": o.failures[:5]} for options, o in outcomes if o.failures],
    }


def checkpoints() -> list[dict[str, Any]]:
    """All of architecture x GQA ratio x head_dim; rope scaling and tied embeddings alternate."""
    shapes = product(MODELS["architecture"], MODELS["gqa_ratio"], MODELS["head_dim"])
    return [
        {"architecture": a, "gqa_ratio": g, "head_dim": d, "llama3_rope": i % 2 == 0, "tied": i // 2 % 2 == 0}
        for i, (a, g, d) in enumerate(shapes)
    ]
