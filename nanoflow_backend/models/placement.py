"""A Place is where one rank's part of a checkpoint tensor goes; the part is cut here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoflow_backend.graph.builder import local_shape
from nanoflow_backend.graph.operation import Parameter, ScaleOf, Source


class Place(NamedTuple):
    """Some rows of a parameter: those of one of its sources."""

    parameter: Parameter
    source: Source
    rows: slice  # of the parameter: of all sources that take turns with this one
    turn: int  # which of them it is

    def of(self, tensor: Tensor) -> Tensor:
        """A view [n, run, columns ...] of these rows of the parameter's `tensor`: n times, run rows together."""
        matrix = tensor.view(-1, *tensor.shape[tensor.ndim - len(self.source.shape) + 1 :])
        turns, run = self.parameter.interleave, self.parameter.run
        return matrix[self.rows].view(-1, turns, run, *matrix.shape[1:])[:, self.turn]


def find_places(parameters: Mapping[str, Parameter], tp: int) -> dict[str, list[Place]]:
    """Where each tensor of the checkpoint goes on every one of `tp` ranks."""
    places: dict[str, list[Place]] = {}
    for parameter in parameters.values():
        row, turns = 0, parameter.interleave
        for number, source in enumerate(parameter.sources):
            height, turn = local_shape(source, tp)[0] * turns, number % turns
            places.setdefault(source.tensor, []).append(Place(parameter, source, slice(row, row + height), turn))
            if turn == turns - 1 and parameter.scale is not ScaleOf.INPUT:  # one scale for all of its sources
                row += height
    return places


def shard(tensor: Any, source: Source, rank: int, tp: int) -> Tensor:
    """One rank's part of `tensor` (lazy or not), at most of local_shape(source, tp): ranks hold whole units, and the
    last of them fewer where those run out."""
    return _in_halves(tensor[_cut(source, rank, tp)], source)


def shards(tensor: Any, source: Source, rank: int, tp: int, most: int) -> Iterator[tuple[int, Tensor]]:
    """shard(...) of a matrix a few rows at a time, of `most` elements or one row (or one unit whose rows are `paired`),
    each with its first row's number."""
    rows, *columns = _cut(source, rank, tp)
    start, stop, _ = rows.indices(source.shape[0])
    together = source.shape[0] // source.units if source.paired else 1
    step = max(most // source.shape[1] // together, 1) * together
    for first in range(start, stop, step):
        yield first - start, _in_halves(tensor[(slice(first, min(first + step, stop)), *columns)], source)


def put(part: Tensor, out: Tensor) -> None:
    """Copy rows [r, columns ...] into the beginning of `out` [n, run, columns ...]; the rest of it stays as it is."""
    run, columns = out.shape[1], part.shape[1:]
    region = out[(slice(None), slice(None), *(slice(size) for size in columns))]
    whole = len(part) // run
    region[:whole] = part[: whole * run].reshape(whole, run, *columns)
    if rest := len(part) - whole * run:
        region[whole, :rest] = part[whole * run :]


def _in_halves(part: Tensor, source: Source) -> Tensor:
    """Whole units of a tensor, with the `paired` rows of each in their order here."""
    if not source.paired:
        return part
    columns = part.shape[1:]
    units = part.reshape(-1, source.shape[0] // source.units, *columns)
    pairs = units[:, : source.paired].reshape(len(units), -1, 2, *columns).transpose(1, 2).flatten(1, 2)
    return torch.cat((pairs, units[:, source.paired :]), 1).flatten(0, 1)


def _cut(source: Source, rank: int, tp: int) -> tuple[slice, ...]:
    """The slice of a checkpoint tensor that `rank` holds. Ranks share a unit where there are fewer units than ranks."""
    whole = tuple(slice(None) for _ in source.shape)
    if source.once and rank:
        return slice(0), *whole[1:]
    if source.shard is None or tp == 1:
        return whole
    units = source.units or source.shape[source.shard]
    if source.units and units < tp:
        first, last = rank * units // tp, rank * units // tp + 1
    else:
        here = -(-units // tp)
        first, last = min(rank * here, units), min((rank + 1) * here, units)
    size = source.shape[source.shard] // units
    return *whole[: source.shard], slice(first * size, last * size), *whole[source.shard + 1 :]
