"""A Family is one metric of the server's page: its name, what it means, and how its value is read from a View."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import msgspec

from nanoflow_backend.process.messages import Load, Ready, Stats
from nanoflow_backend.scheduler.observed import Histogram

Kind = Literal["gauge", "counter", "histogram"]
# Reasons that are there from the start, so that their first rise is seen as one. Others may come.
REFUSALS = ("invalid", "queue_full", "queue_timeout", "deadline", "unavailable", "engine_failure", "internal")
ASKED_N = (1.0, 2.0, 5.0, 10.0, 20.0)  # sequences
Values = Mapping[tuple[str, ...], float]  # by the values of a family's labels


class View(msgspec.Struct):
    """All that there is to show: what the engine said last, and what only the stub knows."""

    ready: Ready
    stats: Stats
    load: Load  # newer than `stats`
    refused: Counter[str] = msgspec.field(default_factory=lambda: Counter(dict.fromkeys(REFUSALS, 0)))
    restarts: int = 0
    up: bool = True
    asked_n: Histogram = msgspec.field(default_factory=lambda: Histogram(ASKED_N))  # of the prompts that were queued
    age_s: float = 0.0  # of `stats`: since the engine sent them, or last said that they still hold


class Family(msgspec.Struct, frozen=True):
    """One metric: its name, kind, help text, labels, and how its value is read.

    `of_stub`: its counts go on when an engine process is replaced. `bounds`: those of the histogram's that are shown.
    `live`: it is written as soon as it changes. `scope`: labels that say which engine a series is of. Equal labels are
    one metric to the server: counters without `engine` add up over the instances of a model, and gauges would
    overwrite each other.
    """

    name: str
    kind: Kind
    meaning: str
    read: Callable[[View], float | Values | Histogram]
    labels: tuple[str, ...] = ()
    of_stub: bool = False
    bounds: tuple[float, ...] | None = None  # None: all
    live: bool = False
    scope: tuple[str, ...] = ("model", "version", "engine")
