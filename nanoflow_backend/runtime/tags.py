"""RowTags knows which value the rows of each buffer hold, so that no launch reads another one's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.runtime.buffers import BufferPlan, LayerValue, Use, uses
from nanoflow_backend.schedule.plan import Schedule
from nanoflow_backend.schedule.validate import describe


class StaleRead(RuntimeError):
    """Rows do not hold the value that is to be read: the message names the launch, the value and the rows."""


class _Claim(NamedTuple):
    """Segments of a buffer, and what they hold after a write or must hold before a read."""

    holders: list[LayerValue | None]
    segments: slice
    held: list[LayerValue]


class RowTags:
    """The holder of every buffer's rows, by segment (see ValueUses); rows of the pages are tagged like a buffer's.

    Tags see what the interleaving of a run shows; that no interleaving goes wrong is for `validate` to say.
    """

    def __init__(self, layers: Sequence[Graph], schedule: Schedule, plan: BufferPlan) -> None:
        """`layers` are the graphs of all layers in order."""
        self.schedule = schedule
        self.steps = schedule.unroll(len(layers))
        self.uses = uses(layers, schedule, self.steps)
        self._plan = plan
        self._holders: dict[int | LayerValue, list[LayerValue | None]] = {}
        self._writes = [self._claims(step) for step in self.uses.writes]
        self._reads = [self._claims(step) for step in self.uses.reads]
        whole = range(len(self.uses.boundaries) - 1)
        first, last = (
            [Use(LayerValue(layer, value), whole.start, whole.stop) for value in layers[0].carried.values()]
            for layer in (-1, len(layers) - 1)
        )
        self._embedded, self._results = self._claims(first), self._claims(last)

    def embed(self) -> None:
        """A batch begins: buffers hold the embedding, and nothing else."""
        for holders in self._holders.values():
            holders[:] = [None] * len(holders)
        for holders, segments, held in self._embedded:
            holders[segments] = held

    def launch(self, step: int) -> None:
        """A step takes the rows that it writes; what it reads must be there, and so not in rows that it writes.

        Raises:
            StaleRead: an input is not written yet, or not any more.
        """
        for holders, segments, held in self._writes[step]:
            holders[segments] = held
        for claim in self._reads[step]:
            holders, segments, held = claim
            if holders[segments] != held:
                layer, number = self.steps[step]
                self._refuse(claim, f"{describe(number, self.schedule.launches[number])} in layer {layer}")

    def read_results(self) -> None:
        """Raises: StaleRead, if a row of the last layer's outputs is not there."""
        for claim in self._results:
            if claim.holders[claim.segments] != claim.held:
                self._refuse(claim, "the head")

    def _refuse(self, claim: _Claim, reader: str) -> None:
        holders, segments, held = claim
        at = next(i for i in range(segments.start, segments.stop) if holders[i] != held[0])
        start, stop = self.uses.boundaries[at : at + 2]
        found = holders[at]
        raise StaleRead(
            f"{reader} reads {held[0].name!r} of layer {held[0].layer}, but its rows {start}..{stop} hold "
            + (f"{found.name!r} of layer {found.layer}" if found else "nothing yet")
        )

    def _claims(self, step: Iterable[Use]) -> list[_Claim]:
        claims = []
        for value, start, stop in step:
            holders = self._holders.setdefault(
                self._plan.holder.get(value, value), [None] * (len(self.uses.boundaries) - 1)
            )
            claims.append(_Claim(holders, slice(start, stop), [value] * (stop - start)))
        return claims
