"""Contention is what stage two knows of the device: each nano-task's shares, and how tasks slow each other down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from nanoflow_search.plan.problem import CyclicTimeline, NanoTask, Problem
from nanoflow_search.predict.timing_model import TimingModel


class ShareChoice(NamedTuple):
    """A share of the device, and what a nano-task takes with it when nothing else runs."""

    sms: int | None  # the most SMs; a partition where all that run have one. None: all SMs, shared
    duration_us: float
    dynamic_j: float = 0.0  # beyond static power


class TaskShare(NamedTuple):
    """A task that runs with a share of the device."""

    task: str
    sms: int | None


@dataclass(frozen=True)
class Contention:
    """The shares and interference of all nano-tasks of a plan, at one clock level.

    slowdown[a, b] says how much longer a takes while b runs beside it. Pairs that are not in it must not overlap.
    """

    device_sms: int
    choices: Mapping[NanoTask, tuple[ShareChoice, ...]]
    slowdown: Mapping[tuple[TaskShare, TaskShare], float]
    power_cap_w: float = math.inf
    static_w: float = 0.0


def share_choice(
    model: TimingModel, operations: tuple[str, ...], start: int, stop: int, sms: int | None
) -> ShareChoice:
    """Return the time and energy of operations on the rows start .. stop - 1 with `sms` SMs (None: all)."""
    rows = (operations, start, stop, sms)
    return ShareChoice(sms, model.operations_us(*rows), model.operations_j(*rows))


def measured_contention(
    model: TimingModel,
    problem: Problem,
    ordered: CyclicTimeline,
    chunk_tokens: int,
    partition: Mapping[str, int] | None = None,
) -> Contention:
    """Return the contention of the nano-tasks of `ordered`, as far as the profile knows it.

    `partition` gives the SMs of each lane, and with it that share alone. Without it the shares of a task are all SMs
    and those with which some pair was measured. A task's slowdown is the mean of its operations', weighted by time.
    """
    own = {task.name: (partition or {}).get(task.lane) for task in problem.tasks}
    task_of = {operation: task.name for task in problem.tasks for operation in task.operations}
    shares: dict[str, set[int | None]] = {name: {sms} for name, sms in own.items()}
    weighed: dict[tuple[TaskShare, TaskShare], list[tuple[float, float]]] = {}  # (weight, slowdown)
    for (one, other), by_sms in model.pair_effects.items():
        first, second = (task_of.get(curve.partition("/")[0]) for curve in (one, other))
        if first is None or second is None or first == second:
            continue
        if partition:
            nearest = model.nearest_effect((one, own[first]), (other, own[second]))
            by_sms = {(own[first], own[second]): nearest} if nearest else {}
        for (sms, other_sms), effect in by_sms.items():
            shares[first].add(sms)
            weight = _weight(model, one, problem, chunk_tokens) * _weight(model, other, problem, chunk_tokens)
            key = TaskShare(first, sms), TaskShare(second, other_sms)
            weighed.setdefault(key, []).append((weight, effect.slowdown))
    slowdown = {}
    for pair, parts in weighed.items():
        total = sum(weight for weight, _ in parts)
        slowdown[pair] = sum(w * s for w, s in parts) / total if total else max(s for _, s in parts)
    choices: dict[NanoTask, tuple[ShareChoice, ...]] = {}
    for nano in (p.nano for p in ordered.placed):
        rows = (nano.start * chunk_tokens, nano.stop * chunk_tokens)
        ascending = sorted(shares[nano.task], key=lambda sms: (sms is not None, sms or 0))
        choices[nano] = tuple(share_choice(model, problem[nano.task].operations, *rows, sms) for sms in ascending)
    header = model.profile.header
    return Contention(header.device_sms, choices, slowdown, header.power_cap_w, header.static_w)


def _weight(model: TimingModel, curve: str, problem: Problem, chunk_tokens: int) -> float:
    """Return the time of a curve alone, on the whole batch."""
    operation, _, phase = curve.partition("/")
    loads = model.loads((operation,), 0, problem.chunks * chunk_tokens)
    return sum(model.duration_us(name, amount, None) for name, amount in loads if not phase or name == curve)
