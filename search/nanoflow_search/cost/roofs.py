"""Roofs say how long a layer takes at least, by each resource alone, as if it were the only limit.

Source: NanoFlow, section 3; power is a fourth resource, which the paper does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_search.cost.devices import GpuSpec
from nanoflow_search.cost.work import Work


@dataclass(frozen=True)
class Roofs:
    """The shortest time of one iteration's layers on one rank, by each resource alone, in seconds."""

    compute_s: float
    memory_s: float
    network_s: float
    power_s: float | None  # in which the power cap allows static power and the dynamic energy; None: not known

    @property
    def sequential_s(self) -> float:
        """The time if operations run one after the other, within the power cap."""
        return max(self.compute_s + self.memory_s + self.network_s, self.power_s or 0.0)

    @property
    def overlapped_s(self) -> float:
        """The time if everything hides behind the scarcest resource."""
        return max(self.compute_s, self.memory_s, self.network_s, self.power_s or 0.0)

    @property
    def bound(self) -> str:
        """The name of the scarcest resource: compute, memory, network or power."""
        times = {"compute": self.compute_s, "memory": self.memory_s, "network": self.network_s}
        times |= {"power": self.power_s} if self.power_s is not None else {}
        return max(times, key=times.__getitem__)


def roofs(graph: Graph, works: Mapping[str, Work], device: GpuSpec, layers: int = 1) -> Roofs:
    """Return the roofs of `layers` equal layers from the work of each operation of one.

    Each operation uses the resource that the graph tags it with, alone and at the device's full rate.

    Raises:
        ValueError: the device has no products of FP8 operands.
    """

    def total(resource: Resource, seconds: dict[str, float]) -> float:
        return layers * sum(seconds[op.name] for op in graph.operations if op.resource is resource)

    compute = {name: device.compute_s(work.flop, work.fp8_flop) for name, work in works.items()}
    memory = {name: work.memory_bytes / device.memory_bytes_per_s for name, work in works.items()}
    network = {name: work.network_bytes / device.network_bytes_per_s for name, work in works.items()}
    power_s = None
    if device.power:
        dynamic_j = layers * sum(dynamic_energy_j(graph[name].resource, work, device) for name, work in works.items())
        power_s = dynamic_j / (device.power.cap_w - device.power.static_w)
    return Roofs(
        total(Resource.COMPUTE, compute), total(Resource.MEMORY, memory), total(Resource.NETWORK, network), power_s
    )


def dynamic_energy_j(resource: Resource, work: Work, device: GpuSpec) -> float:
    """Return the energy of `work` beyond static power, in joules.

    Raises:
        ValueError: the device's energies are not known.
    """
    power = device.power
    if power is None:
        raise ValueError(f"{device.name}: no energies are known of it")
    match resource:
        case Resource.COMPUTE:
            return power.compute_j(work.flop, work.fp8_flop)
        case Resource.MEMORY:
            return work.memory_bytes * power.j_per_byte
        case Resource.NETWORK:
            return work.network_bytes * power.j_per_network_byte
