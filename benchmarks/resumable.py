"""A result that is measured cell by cell is kept in a file, from which a run that was cut goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from nanoflow_backend.bench import result

Cell = dict[str, Any]


class Record:
    """Cells are found by what of them is asked for. `summary` tells of all of them what one cannot."""

    def __init__(
        self, output: Path, facts: Mapping[str, Any], summary: Callable[[Sequence[Cell]], Cell] = lambda _: {}
    ) -> None:
        """Raises: ValueError, the file is of another run."""
        self.cells: list[Cell] = []
        self._output, self._facts, self._summary = output, facts, summary
        if output.exists():
            found = json.loads(output.read_text())
            different = [
                f"{name} is {found.get(name)!r} there and {fact!r} here"
                for name, fact in facts.items()
                if found.get(name) != fact
            ]
            if different:
                raise ValueError(f"{output}: the result of another run: {'; '.join(different)}")
            self.cells = found["cells"]

    def find(self, key: Cell) -> Cell | None:
        return next((cell for cell in self.cells if key.items() <= cell.items()), None)

    def put(self, key: Cell, cell: Cell) -> None:
        """In the place of what is known of it, or after the others."""
        known, put = self.find(key), {**key, **cell}
        self.cells = [put if c is known else c for c in self.cells] if known else [*self.cells, put]
        result.write({**self._facts, **self._summary(self.cells), "cells": self.cells}, self._output)


def fill(
    record: Record,
    keys: Sequence[Cell],
    measure: Callable[[Cell, Cell | None], Cell],
    told: Callable[[Cell], str],
) -> None:
    """`measure(key, known)` gives the cell of each key, and what is `known` of it as it is, if nothing is missing."""
    took_s: list[float] = []
    for number, key in enumerate(keys, 1):
        begun_s, known = time.monotonic(), record.find(key)
        cell = measure(key, known)
        where = f"[{number}/{len(keys)}] " + ", ".join(f"{name} {value}" for name, value in key.items())
        if known == {**key, **cell}:
            print(f"{where}: known", flush=True)
            continue
        record.put(key, cell)
        took_s.append(time.monotonic() - begun_s)
        print(f"{where}: {told(cell)}; {mean(took_s) * (len(keys) - number):.0f} s left", flush=True)
