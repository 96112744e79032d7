"""The full product of the parity test: every architecture x GQA ratio x head_dim, in every way to run it.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels:tests python benchmarks/parity.py

writes benchmarks/results/parity.json: a header, the totals, and every run that failed or was not wholly compared.
Takes about an hour and a half on one core; exits with 1 if any run failed.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from transformers_parity import DENSE_BATCH_TOKENS, MODELS, NARROW_GAP, OUTPUT_TOKENS, RUNS, TOLERANCE, run

RESULT = Path(__file__).parent / "results" / "parity.json"


def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    models, runs = checkpoints(), [dict(zip(RUNS, values, strict=True)) for values in product(*RUNS.values())]
    header = {
        "command": "python benchmarks/parity.py",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "dense_batch_tokens": DENSE_BATCH_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "tolerance": TOLERANCE,
        "narrow_gap": NARROW_GAP,
        "checkpoints": models,
        "runs_of_each": RUNS,
    }
    total = {"runs": 0, "failed_runs": 0, "rows": 0, "excused_rows": 0, "different_tokens": 0, "worst_logits": 0.0}
    split = {"steps": 0, "split_steps": 0, "split_chunks": 0, "worst_share_of_split_steps": 1.0}
    notable: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for model, options in track(list(product(models, runs)), "Comparing"):
            outcome = run(model, options, Path(folder))
            total["runs"] += 1
            total["failed_runs"] += bool(outcome.failures)
            total["worst_logits"] = max(total["worst_logits"], outcome.worst_logits)
            for name in ("rows", "excused_rows", "different_tokens"):
                total[name] += getattr(outcome, name)
            if options["schedule"] != "sequential" and outcome.steps:
                for name in ("steps", "split_steps", "split_chunks"):
                    split[name] += getattr(outcome, name)
                share = outcome.split_steps / outcome.steps
                split["worst_share_of_split_steps"] = min(split["worst_share_of_split_steps"], share)
            if outcome.failures or outcome.excused_rows or outcome.different_tokens:
                notable.append({**model, **options, **asdict(outcome)})
    result = {"header": header, "total": total, "nano_batched": split, "notable": notable}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(total | split, indent=1))
    sys.exit(total["failed_runs"] > 0)


def checkpoints() -> list[dict[str, Any]]:
    """All of architecture x GQA ratio x head_dim; rope scaling and tied embeddings alternate."""
    shapes = product(MODELS["architecture"], MODELS["gqa_ratio"], MODELS["head_dim"])
    return [
        {"architecture": a, "gqa_ratio": g, "head_dim": d, "llama3_rope": i % 2 == 0, "tied": i // 2 % 2 == 0}
        for i, (a, g, d) in enumerate(shapes)
    ]


if __name__ == "__main__":
    main()
