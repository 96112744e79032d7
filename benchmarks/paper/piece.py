"""A piece is a nano-task as annealing moves it; parts say how finely a task may be cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from nanoflow_search.plan.problem import NanoTask, Problem


class Piece(NamedTuple):
    """A nano-task with its layer, its SMs, and the decodes that it has."""

    nano: NanoTask
    layers_ahead: int
    sms: int | None
    decodes: int = 0  # how many of its rows decode, if it is attention's


Pieces = tuple[Piece, ...]  # each lane's in its order


class Parts(NamedTuple):
    """How many pieces a task must and may have. Only pieces with decodes count towards the least of attention."""

    least: int = 1
    most: int = 8


def attention_of(problem: Problem) -> str | None:
    """Return the task that reads pages: how long it takes follows from which rows decode."""
    return next((d.reader for d in problem.dependencies if d.pages), None)


def count(pieces: Pieces, task: str, attention: str | None) -> int:
    """Return how many pieces of a task count towards the least."""
    return sum(p.nano.task == task and (task != attention or p.decodes > 0) for p in pieces)


def divided(pieces: Pieces, parts: Mapping[str, Parts], attention: str | None) -> Pieces:
    """Return the pieces, with the largest of a task's cut in halves until there are as many as it must have.

    Raises:
        ValueError: a task that cannot be cut so often, or has too many pieces then.
    """
    for task, (least, most) in parts.items():
        while count(pieces, task, attention) < least:
            n = max(
                (n for n, p in enumerate(pieces) if p.nano.task == task),
                key=lambda n: (pieces[n].decodes, pieces[n].nano.stop - pieces[n].nano.start),
            )
            _, start, stop = pieces[n].nano
            if stop - start < 2 or (task == attention and pieces[n].decodes < 2):
                raise ValueError(f"pieces: expected {task} to be cut in {least} parts")
            decodes = pieces[n].decodes * ((stop - start) // 2) // (stop - start)
            pieces = (*pieces[:n], *cut(pieces[n], (start + stop) // 2, decodes), *pieces[n + 1 :])
        if sum(p.nano.task == task for p in pieces) > most:
            raise ValueError(f"pieces: expected at most {most} of {task}")
    return pieces


def cut(piece: Piece, at: int, decodes: int) -> tuple[Piece, Piece]:
    """Cut a piece in two; the first part gets `decodes` of its decodes."""
    task, start, stop = piece.nano
    return (
        piece._replace(nano=NanoTask(task, start, at), decodes=decodes),
        piece._replace(nano=NanoTask(task, at, stop), decodes=piece.decodes - decodes),
    )
