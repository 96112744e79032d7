"""A NanoOperation is an operation on some of a batch's tokens; this module finds what it must wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanoflow_backend.graph.operation import Graph, Kind


class NanoOperation(NamedTuple):
    """Operation `operation` on the tokens start .. stop - 1 of the batch."""

    operation: str
    start: int
    stop: int


class Dependency(NamedTuple):
    """The nano-operation at index `writer`, of the same layer or of `layers_back` = 1 layer before."""

    writer: int
    layers_back: int


def dependencies(graph: Graph, nanos: Sequence[NanoOperation]) -> list[list[Dependency]]:
    """For each nano-operation those that write what it reads.

    A value of tokens is read row by row: its writers are those with common tokens.
    """
    writers: dict[str, list[int]] = {}
    for index, nano in enumerate(nanos):
        for value in graph[nano.operation].outputs:
            writers.setdefault(value, []).append(index)

    def depends(reader: NanoOperation, value: str) -> list[Dependency]:
        first, stop = rows_read(graph, value, reader)
        return [
            Dependency(i, int(value in graph.carried))
            for i in writers.get(graph.carried.get(value, value), ())
            if nanos[i].start < stop and first < nanos[i].stop
        ]

    return [sorted({d for value in graph[nano.operation].inputs for d in depends(nano, value)}) for nano in nanos]


def rows_read(graph: Graph, value: str, reader: NanoOperation) -> tuple[int, int]:
    """The rows start, stop of `value` that a nano-operation reads: its own, but of the pages all before them too.

    Pages are read from a request's first token on, and which requests straddle a boundary is not known before the
    batch is: attention waits for the append of every token before its own last one.
    """
    return (0 if graph.values[value].kind is Kind.PAGES else reader.start), reader.stop
