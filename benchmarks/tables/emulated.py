"""Rows of a rank that ran alone, beside a clock for the others: predictions, each of which says so."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tables.result_files import load_emulated
from benchmarks.tables.result_row import ResultRow, rates, requests


def emulated() -> Iterator[ResultRow]:
    for run in load_emulated("emulated_tp"):
        about = run["emulated"]
        low, high = (f"{share:.0%}" for share in about["rank_skew"])
        for cell in run["cells"]:
            told = (
                f"{name} {gain:.3f}x ({low:.3f} to {high:.3f}; with the energy of links "
                f"{' to '.join(f'{linked:.3f}' for linked in sorted(arm['over_sequential_with_links']))})"
                for name, arm in cell["arms"].items()
                for gain, low, high in [arm["over_sequential"]]
            )
            yield ResultRow(
                f"EMULATED: a steady batch of {cell['tokens']:,} tokens at {run['workload']}, {run['model']} on "
                f"{about['ranks']} GPUs, against sequential with {about['network']}'s times",
                f"{'; '.join(told)}; ranks that are late by {low} to {high} of a step are not in it",
                f"one rank alone on {run['gpu']}",
            )
    for run in load_emulated("offline"):
        about = run["emulated"]
        yield ResultRow(
            f"EMULATED: offline, {requests(run)}, schedule {run['schedule']}, {about['ranks']} GPUs, network "
            f"{about['network']}: whole run",
            f"{rates(run)} (energy of one device, without links)",
            f"one rank alone on {run['gpu']}",
        )
