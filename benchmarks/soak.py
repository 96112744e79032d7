"""Soak: the demo model through the real server at twice its capacity, with all that goes wrong in production.

    PYTHONPATH=.:kernels:tests/support python -P benchmarks/soak.py --minutes 30 --output benchmarks/results/soak.json

Prints a line a round, writes the result whatever it is, and exits with 1 if anything failed.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer
from soak_run import run

from nanoflow_backend.bench import result


def main(
    minutes: float = 30.0, output: Annotated[Path | None, typer.Option()] = None, round_s: float = 20.0, seed: int = 0
) -> None:
    report = run(60 * minutes, round_s, seed, functools.partial(print, flush=True))
    result.write({"minutes": minutes, "seed": seed, **report}, output)
    sys.exit(bool(report["failures"]))


if __name__ == "__main__":
    typer.run(main)
