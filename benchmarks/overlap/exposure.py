"""How long a step's collectives ran, and how much of that was exposed: nothing else ran beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nanoflow_backend.bench.step_trace.launch_times import LaunchTime
from nanoflow_backend.graph.operation import Resource
from nanoflow_backend.runtime.binding import BoundPlan

Interval = tuple[float, float]  # from, until


class Exposure(NamedTuple):
    """Of a layer on average, in microseconds."""

    network_us: float
    exposed_us: float

    @classmethod
    def of(cls, times: Sequence[LaunchTime], plan: BoundPlan) -> Exposure:
        """`times` are those of one step's launches under `plan`, a launch's time beginning when its waits are over."""
        network: list[Interval] = []
        others: list[Interval] = []
        for time in times:
            layer, number = plan.steps[time.step]
            operation = plan.layers[layer][plan.schedule.launches[number].operation]
            (network if operation.resource is Resource.NETWORK else others).append((time.start_s, time.end_s))
        network, others = _merged(network), _merged(others)
        ran_s = sum(end - start for start, end in network)
        covered_s = sum(max(0.0, min(b, d) - max(a, c)) for a, b in network for c, d in others)
        layers = len(plan.layers)
        return cls(1e6 * ran_s / layers, 1e6 * (ran_s - covered_s) / layers)


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    """The same times as intervals that have no moment in common."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found
