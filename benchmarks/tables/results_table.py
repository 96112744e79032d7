"""The tables of the README and of docs/results.md are written from benchmarks/results, between two markers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.tables.full_table import groups
from benchmarks.tables.headlines import headlines
from benchmarks.tables.result_row import ResultRow

ROOT = Path(__file__).parents[2]
README, FULL = ROOT / "README.md", ROOT / "docs" / "results.md"
BEGIN = "<!-- measured: written by `python -m benchmarks results-table` from benchmarks/results -->"
END = "<!-- end of measured -->"


def main(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 if a file is stale.")] = False,
) -> None:
    """Write the seven rows of the README and the full table of docs/results.md from the result files."""
    for path, text in ((README, table(headlines())), (FULL, full())):
        wanted = between_markers(path.read_text(), text)
        if check and wanted != path.read_text():
            print(f"{path.relative_to(ROOT)}: has other tables than benchmarks/results makes")
            raise typer.Exit(1)
        if not check:
            path.write_text(wanted)


def full() -> str:
    """All tables, each under its heading."""
    return "\n".join(f"## {heading}\n\n{table(rows)}" for heading, rows in groups().items() if rows)


def table(rows: Iterable[ResultRow]) -> str:
    """Rows in Markdown."""
    lines = ["| what | measured | hardware |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def between_markers(text: str, tables: str) -> str:
    """`text` with other tables between its markers. Raises: ValueError, it has no markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"
