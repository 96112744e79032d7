"""The machine of a search is the GPU that is here, or the synthetic device; a profile is measured on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.workload import Mix
from nanoflow_search.hardware.interface import Machine
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.predict.predict import Timer
from nanoflow_search.profile.data import Profile, held_out
from nanoflow_search.profile.load import LoadRunner, ProfileError
from nanoflow_search.profile.measure import profile_header, take_profile
from nanoflow_search.profile.points import attention_sms_for, partition_loads, shared_loads
from nanoflow_search.request import SearchRequest

SYNTHETIC = "H200-sustained"  # the only device whose energies are known


class GpuMachine:
    """The first GPU that is visible."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load_runner(self, request: SearchRequest, mix: Mix) -> LoadRunner:
        """See Machine."""
        from nanoflow_search.hardware.gpu import GpuLoadRunner

        return GpuLoadRunner.here(request.config, mix, precision=request.precision)

    def timer(self, request: SearchRequest, mix: Mix, *, num_layers: int | None = None, seconds: float = 1.0) -> Timer:
        """See Machine."""
        from nanoflow_search.hardware.plan_timer import PlanTimer

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
            request.model.layer, DEVICES[SYNTHETIC], ranks=request.ranks, noise=0.0, precision=request.precision
        )


def find_machine(kind: Literal["auto", "synthetic"], ranks: int) -> Machine | None:
    """Return the machine to measure on; None: here is no GPU, or no torch to use it with.

    Raises:
        SearchError: the GPU cannot be measured with so many ranks.
    """
    if kind == "synthetic":
        return SyntheticMachine()
    try:
        from nanoflow_backend.runtime.device import find_device
    except ImportError:  # no torch: planning needs none
        return None
    if (device := find_device("auto")).kind == "cpu":
        return None
    if ranks > 1:
        raise SearchError(f"tp: {ranks} ranks cannot be measured yet, expected 1")
    return GpuMachine(device.name)


def measure_profile(
    machine: Machine,
    request: SearchRequest,
    sizes: tuple[int, ...],
    shared: bool,
    path: Path,
    say: Callable[[str], None],
) -> None:
    """Measure what the profile in the file `path` still lacks for batches of `sizes` tokens.

    A profile holds what lanes with SMs of their own need; with `shared`, or several ranks, also what lanes need that
    share them.

    Raises:
        ProfileError: the file is a profile of something else.
    """
    mix = request.mix(request.workloads[0], max(sizes), machine.name)
    device = machine.load_runner(request, mix)
    graph, ranks = request.model.layer, request.ranks
    mixes = [request.mix(workload, tokens, machine.name) for workload in request.workloads for tokens in sizes]
    shares = attention_sms_for(graph, device.sms, mixes, request.precision)
    alone, together = partition_loads(graph, device.sms, mix, max(sizes), shares) if ranks == 1 else ((), ())
    if shared or ranks > 1:
        others = shared_loads(graph, device.sms, mix, max(sizes))
        alone, together = (*alone, *others.alone), (*together, *others.together)
    header = profile_header(device, graph, ranks, request.precision)
    profile = take_profile(device, header, alone, together, path, say)
    say(f"{len(profile.points)} points, {len(profile.pairs)} pairs; {_interpolation_error(profile)}")


def _interpolation_error(profile: Profile) -> str:
    """Say how far off the profile is between its points; of a small model at few amounts nothing can be said."""
    try:
        errors = held_out(profile)
    except ProfileError as error:
        return str(error)
    return f"errors at points held out: median {errors.median:.1%}, worst {errors.worst:.1%} ({errors.worst_operation})"
