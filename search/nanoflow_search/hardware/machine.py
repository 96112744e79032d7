"""The machine of a search is the GPU that is here, or the synthetic device; a profile is measured on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from nanoflow_backend.config.network_table import NetworkTable
from nanoflow_backend.graph.operation import Graph, Resource
from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.interface import Machine
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import Timer
from nanoflow_search.profile.data import Profile, held_out
from nanoflow_search.profile.load import Load, LoadRunner, ProfileError
from nanoflow_search.profile.measure import profile_header, take_profile
from nanoflow_search.profile.network import check_sms, network_sms
from nanoflow_search.profile.points import attention_sms_for, partition_loads, shared_loads
from nanoflow_search.request import SearchRequest

SYNTHETIC = "H200-sustained"  # the only device whose energies are known
NETWORK_SMS = (8, 16)  # of collectives beside other work: each SM is one that products do not have


class GpuMachine:
    """The first GPU that is visible."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load_runner(self, request: SearchRequest, mix: Mix) -> LoadRunner:
        """See Machine."""
        from nanoflow_search.hardware.gpu import GpuLoadRunner

        graph, ranks = request.operations, request.ranks
        return GpuLoadRunner.here(request.config, mix, precision=request.precision, graph=graph, ranks=ranks)

    def timer(self, request: SearchRequest, mix: Mix, *, num_layers: int | None = None, seconds: float = 1.0) -> Timer:
        """See Machine. Raises: SearchError, several ranks: one GPU runs no plan of theirs."""
        from nanoflow_search.hardware.plan_timer import PlanTimer

        if request.ranks > 1:
            raise SearchError(f"tp: plans of {request.ranks} ranks cannot be timed on one GPU")
        return PlanTimer.here(request.config, mix, num_layers=num_layers, seconds=seconds, precision=request.precision)


class SyntheticMachine:
    """The synthetic device, without noise, so that a run that was cut ends like one that was not."""

    name = f"synthetic {SYNTHETIC}"

    def load_runner(self, request: SearchRequest, mix: Mix) -> LoadRunner:
        """See Machine."""
        return self._device(request)

    def timer(self, request: SearchRequest, mix: Mix, *, num_layers: int | None = None, seconds: float = 1.0) -> Timer:
        """See Machine."""
        device = self._device(request)
        return lambda schedule: device.time_plan(schedule, mix, num_layers or request.model.num_layers)

    def _device(self, request: SearchRequest) -> SyntheticDevice:
        return SyntheticDevice(
            request.operations, DEVICES[SYNTHETIC], ranks=request.ranks, noise=0.0, precision=request.precision
        )


def find_machine(kind: Literal["auto", "synthetic"], ranks: int, has_table: bool = False) -> Machine | None:
    """Return the machine to measure on; None: here is no GPU, or no torch to use it with.

    Where a network's table stands in for collectives (`has_table`), one GPU measures what a rank has beside them.

    Raises:
        SearchError: collectives of so many ranks cannot be measured.
    """
    if kind == "synthetic":
        return SyntheticMachine()
    try:
        from nanoflow_backend.runtime.device import find_device
    except ImportError:  # no torch: planning needs none
        return None
    if (device := find_device("auto")).kind == "cpu":
        return None
    if ranks > 1 and not has_table:
        raise SearchError(
            f"tp: collectives of {ranks} ranks cannot be measured here: expected --network with a table of their times"
        )
    return GpuMachine(device.name)


def measure_profile(
    machine: Machine,
    request: SearchRequest,
    sizes: tuple[int, ...],
    shared: bool,
    path: Path,
    say: Callable[[str], None],
    network: Sequence[NetworkTable] = (),
) -> None:
    """Measure what the profile in the file `path` still lacks for batches of `sizes` tokens.

    A profile holds what lanes with SMs of their own need; with `shared` also what lanes need that share them. Where
    tables of the `network` stand in for collectives, none is measured.

    Raises:
        ProfileError: the file is a profile of something else.
        ConfigError: a table with times on more SMs than half of the device's.
    """
    mix = request.mix(request.workloads[0], max(sizes), machine.name)
    device = machine.load_runner(request, mix)
    check_sms(network, device.sms)
    graph, ranks = request.operations, request.ranks
    mixes = [request.mix(workload, tokens, machine.name) for workload in request.workloads for tokens in sizes]
    shares = attention_sms_for(graph, device.sms, mixes, request.precision)
    own = (network_sms(network) or NETWORK_SMS) if ranks > 1 else ()
    alone, together = partition_loads(graph, device.sms, mix, max(sizes), shares, own)
    if shared:
        others = shared_loads(graph, device.sms, mix, max(sizes))
        alone, together = (*alone, *others.alone), (*together, *others.together)
    if network:
        alone = tuple(one for one in alone if not _is_collective(graph, one.load))
        together = tuple(pair for pair in together if not any(_is_collective(graph, load) for load in pair))
    header = profile_header(device, request.model.layer, ranks, request.precision)
    profile = take_profile(device, header, alone, together, path, say)
    say(f"{len(profile.points)} points, {len(profile.pairs)} pairs; {_interpolation_error(profile)}")


def _is_collective(graph: Graph, load: Load) -> bool:
    return any(op.name == load.operation and op.resource is Resource.NETWORK for op in graph.operations)


def _interpolation_error(profile: Profile) -> str:
    """Say how far off the profile is between its points; of a small model at few amounts nothing can be said."""
    try:
        errors = held_out(profile)
    except ProfileError as error:
        return str(error)
    return f"errors at points held out: median {errors.median:.1%}, worst {errors.worst:.1%} ({errors.worst_operation})"
