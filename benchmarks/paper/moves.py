"""A move changes one thing of a plan at random; annealing makes one after the other."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from nanoflow_search.plan.problem import NanoTask, Problem

from benchmarks.paper.piece import Parts, Piece, Pieces, attention_of, count, cut

MOST_LAYERS_AHEAD = 2  # that a nano-task may run ahead
FARTHEST = 2  # chunks by which a boundary moves at most
# How often each kind of move is drawn, relative to the others.
MOVE_WEIGHTS = {"order": 5, "swap": 1, "layer": 1, "share": 4, "boundary": 4, "decodes": 3, "join": 1, "split": 1}
NEIGHBOUR_PROBABILITY = 0.6  # with which a new place or share is the one next to the old one; else any
ALL_DECODES_PROBABILITY = 0.15  # with which a move of decodes takes all that a piece has; else a power of two


class Moves:
    """Draws moves of plans of one problem. `sms` holds the shares that each task may have, in ascending order."""

    def __init__(
        self,
        problem: Problem,
        sms: Mapping[str, Sequence[int | None]],
        parts: Mapping[str, Parts],
        chunk_tokens: int,
        rng: random.Random,
    ) -> None:
        self._chunks, self._chunk_tokens = problem.chunks, chunk_tokens
        self._attention = attention_of(problem)
        self._lane = {task.name: task.lane for task in problem.tasks}
        self._sms = sms
        self._parts = {task.name: parts.get(task.name, Parts()) for task in problem.tasks}
        self._rng = rng
        self._kinds = [kind for kind, often in MOVE_WEIGHTS.items() for _ in range(often)]

    def one(self, pieces: Pieces) -> Pieces | None:
        """Return the plan after one move; None, if the move that was drawn is not possible."""
        n = self._rng.randrange(len(pieces))
        match self._rng.choice(self._kinds):
            case "order":
                return self._order(pieces, n)
            case "swap":
                return self._swap(pieces, n)
            case "layer":
                return self._layer(pieces, n)
            case "share":
                return self._share(pieces, n)
            case "boundary":
                return self._boundary(pieces, n)
            case "decodes":
                return self._decodes(pieces)
            case "join":
                return self._join(pieces, n)
            case _:
                return self._split(pieces, n)

    def _mates(self, pieces: Pieces, n: int) -> list[int]:
        """Return the numbers of all pieces in the lane of piece n."""
        lane = self._lane[pieces[n].nano.task]
        return [m for m, p in enumerate(pieces) if self._lane[p.nano.task] == lane]

    def _order(self, pieces: Pieces, n: int) -> Pieces | None:
        """Move a piece within its lane; beyond the lane's ends it becomes one of the next or the last layer."""
        mates = self._mates(pieces, n)
        near = self._rng.random() < NEIGHBOUR_PROBABILITY
        to = mates.index(n) + self._rng.choice((-1, 1)) if near else self._rng.randrange(len(mates))
        if 0 <= to < len(mates):
            return _moved(pieces, n, mates[to], pieces[n])
        ahead = pieces[n].layers_ahead + (1 if to < 0 else -1)
        if not 0 <= ahead <= MOST_LAYERS_AHEAD:
            return None
        return _moved(pieces, n, mates[to % len(mates)], pieces[n]._replace(layers_ahead=ahead))

    def _swap(self, pieces: Pieces, n: int) -> Pieces | None:
        m = self._rng.choice(self._mates(pieces, n))
        found = list(pieces)
        found[n], found[m] = found[m], found[n]
        return tuple(found)

    def _layer(self, pieces: Pieces, n: int) -> Pieces | None:
        ahead = pieces[n].layers_ahead + self._rng.choice((-1, 1))
        if not 0 <= ahead <= MOST_LAYERS_AHEAD:
            return None
        return _moved(pieces, n, self._rng.choice(self._mates(pieces, n)), pieces[n]._replace(layers_ahead=ahead))

    def _share(self, pieces: Pieces, n: int) -> Pieces | None:
        choices = self._sms[pieces[n].nano.task]
        near = self._rng.random() < NEIGHBOUR_PROBABILITY
        at = choices.index(pieces[n].sms) + self._rng.choice((-1, 1)) if near else self._rng.randrange(len(choices))
        if not 0 <= at < len(choices):
            return None
        return _moved(pieces, n, n, pieces[n]._replace(sms=choices[at]))

    def _boundary(self, pieces: Pieces, n: int) -> Pieces | None:
        """Move a boundary, of one task or of all that are cut there."""
        task, _, boundary = pieces[n].nano
        if boundary == self._chunks:
            return None
        to = boundary + self._rng.choice((-1, 1)) * self._rng.randint(1, FARTHEST)
        alone = self._rng.random() < 0.5
        found = list(pieces)
        for m, p in enumerate(pieces):
            other, start, stop = p.nano
            if boundary in (start, stop) and (other == task or not alone):
                start, stop = (to if edge == boundary else edge for edge in (start, stop))
                if not 0 <= start < stop <= self._chunks:
                    return None
                found[m] = p._replace(nano=NanoTask(other, start, stop))
        return self._seated(found)

    def _seated(self, pieces: list[Piece]) -> Pieces:
        """Move decodes that find no row in their piece to the first pieces of attention with free rows."""
        members = [m for m, p in enumerate(pieces) if p.nano.task == self._attention]
        left = 0
        for m in members:
            if (over := -self._free(pieces[m])) > 0:
                pieces[m], left = pieces[m]._replace(decodes=pieces[m].decodes - over), left + over
        for m in members:
            taken = min(self._free(pieces[m]), left)
            pieces[m], left = pieces[m]._replace(decodes=pieces[m].decodes + taken), left - taken
        return tuple(pieces)

    def _free(self, piece: Piece) -> int:
        """Return how many rows of a piece do not decode."""
        return (piece.nano.stop - piece.nano.start) * self._chunk_tokens - piece.decodes

    def _decodes(self, pieces: Pieces) -> Pieces | None:
        """Move decodes from one piece of attention to another."""
        members = [m for m, p in enumerate(pieces) if p.nano.task == self._attention]
        if len(members) < 2:
            return None
        giver, taker = self._rng.sample(members, 2)
        has = pieces[giver].decodes
        some = has if self._rng.random() < ALL_DECODES_PROBABILITY else min(has, 2 ** self._rng.randrange(8))
        some = min(some, self._free(pieces[taker]))
        found = list(pieces)
        for m, more in ((giver, -some), (taker, some)):
            found[m] = pieces[m]._replace(decodes=pieces[m].decodes + more)
        return self._whole(tuple(found), pieces[giver].nano.task)

    def _join(self, pieces: Pieces, n: int) -> Pieces | None:
        """Join a piece with the one on the next tokens."""
        task, start, stop = pieces[n].nano
        for m, p in enumerate(pieces):
            if p.nano[:2] == (task, stop):
                nano = NanoTask(task, start, p.nano.stop)
                found = list(pieces)
                found[n] = pieces[n]._replace(nano=nano, decodes=pieces[n].decodes + p.decodes)
                del found[m]
                return self._whole(tuple(found), task)
        return None

    def _split(self, pieces: Pieces, n: int) -> Pieces | None:
        """Split a piece; its decodes have the rows that come first."""
        task, start, stop = pieces[n].nano
        if stop - start < 2 or sum(p.nano.task == task for p in pieces) >= self._parts[task].most:
            return None
        at = self._rng.randrange(start + 1, stop)
        decodes = min(pieces[n].decodes, (at - start) * self._chunk_tokens)
        return (*pieces[:n], *cut(pieces[n], at, decodes), *pieces[n + 1 :])

    def _whole(self, pieces: Pieces, task: str) -> Pieces | None:
        """Return the plan; None, if a task has fewer parts than it must have."""
        return pieces if count(pieces, task, self._attention) >= self._parts[task].least else None


def _moved(pieces: Pieces, n: int, to: int, piece: Piece) -> Pieces:
    found = list(pieces)
    del found[n]
    found.insert(to, piece)
    return tuple(found)
