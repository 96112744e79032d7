"""Each kernel is timed alone at the shapes of Llama-3-8B, back to back for seconds, on a GPU."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.kernels.cases import attentions, experts, products, row_kernels, samples
from benchmarks.kernels.measure import FLOP_PER_S, READ_BYTES_PER_S, measure_kernel
from nanoflow_backend.bench import result


def main(
    output: Annotated[Path, typer.Option(help="Where the JSON result goes.")],
    duration_s: Annotated[float, typer.Option(help="Of back-to-back work that is measured, a case.")] = 1.5,
    only: Annotated[str, typer.Option(help="Cases in whose name this regular expression is found.")] = "",
) -> None:
    """Time, power and energy of each kernel alone at the shapes of Llama-3-8B and of Mixtral-8x7B's experts.

    Decode attention alone, also on few SMs of its own: --only 'decodes of \\d+ page 64' --duration-s 0.6.
    """
    torch.manual_seed(0)
    results = []
    for group in (row_kernels, products, attentions, experts, samples):
        for case in group():
            if re.search(only, case.name):
                results.append(measure_kernel(case, duration_s))
                print(" ".join(f"{key}={value}" for key, value in asdict(results[-1]).items()), flush=True)
    roofs = {"read_bytes_per_s": READ_BYTES_PER_S, "flop_per_s": FLOP_PER_S}
    result.write({"roofs": roofs, "results": [asdict(measured) for measured in results]}, output)
