"""Machine: what a search measures on: a GPU, or the law that stands for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

from nanoflow_search.checkpoint import SearchError
from nanoflow_search.cost.devices import DEVICES
from nanoflow_search.cost.work import Mix
from nanoflow_search.emit.trials import Timer
from nanoflow_search.hardware.synthetic import SyntheticDevice
from nanoflow_search.profile.data import Device, Profile, ProfileError, held_out
from nanoflow_search.profile.measure import header_of, take_profile
from nanoflow_search.profile.points import loads_of, partition_loads_of, shares_for
from nanoflow_search.request import Setting

SYNTHETIC = "H200-sustained"  # the only one whose energies are known


class Machine(Protocol):
    name: str  # of the device, as profiles and schedule files have it

    def device(self, setting: Setting, mix: Mix) -> Device:
        """To profile, with the contexts of `mix`."""
        ...

    def timer(self, setting: Setting, mix: Mix) -> Timer:
        """Of schedules for batches of `mix`."""
        ...


class Gpu:
    """The first one that is visible."""

    def __init__(self, name: str) -> None:
        self.name = name

    def device(self, setting: Setting, mix: Mix) -> Device:
        from nanoflow_search.hardware.gpu import GpuDevice

        return GpuDevice.here(setting.config, mix, precision=setting.precision)

    def timer(self, setting: Setting, mix: Mix) -> Timer:
        from nanoflow_search.hardware.plan_timer import PlanTimer

        return PlanTimer.here(setting.config, mix, precision=setting.precision)


class Synthetic:
    """See SyntheticDevice. Without noise, so that a run that was cut ends as one that was not."""

    name = f"synthetic {SYNTHETIC}"

    def device(self, setting: Setting, mix: Mix) -> Device:
        return self._device(setting)

    def timer(self, setting: Setting, mix: Mix) -> Timer:
        device = self._device(setting)
        return lambda schedule: device.time_plan(schedule, mix, setting.model.num_layers)

    def _device(self, setting: Setting) -> SyntheticDevice:
        return SyntheticDevice(setting.model.layer, DEVICES[SYNTHETIC], ranks=setting.ranks, noise=0.0)


def find_machine(kind: Literal["auto", "synthetic"], ranks: int) -> Machine | None:
    """None: no GPU here, or nothing that could use one. Raises: SearchError, more ranks than can be measured."""
    if kind == "synthetic":
        return Synthetic()
    try:
        from nanoflow_backend.runtime.device import find_device
    except ImportError:  # no torch: planning needs none
        return None
    if (device := find_device("auto")).kind == "cpu":
        return None
    if ranks > 1:
        raise SearchError(f"tp: {ranks} ranks cannot be measured yet, expected 1")
    return Gpu(device.name)


def measure_profile(
    machine: Machine,
    setting: Setting,
    sizes: tuple[int, ...],
    shared: bool,
    path: Path,
    progress: Callable[[str], None],
) -> None:
    """For lanes with SMs of their own; with `shared`, or several ranks, for those that share them, too.

    What `path` holds of it already is not measured again. Raises: ProfileError, it is of something else.
    """
    mix = setting.mix(setting.workloads[0], max(sizes), machine.name)
    device = machine.device(setting, mix)
    graph = setting.model.layer
    header = header_of(device, graph, setting.ranks, setting.precision)
    mixes = [setting.mix(workload, tokens, machine.name) for workload in setting.workloads for tokens in sizes]
    shares = shares_for(graph, device.sms, mixes)
    alone, together = partition_loads_of(graph, device.sms, mix, max(sizes), shares) if setting.ranks == 1 else ((), ())
    if shared or setting.ranks > 1:
        others = loads_of(graph, device.sms, mix, max(sizes))
        alone, together = (*alone, *others.alone), (*together, *others.together)
    profile = take_profile(device, header, alone, together, path, progress)
    progress(f"{len(profile.points)} points, {len(profile.pairs)} pairs; {_doubt(profile)}")


def _doubt(profile: Profile) -> str:
    """How far off it is between its points; a small model at few amounts has none to tell by."""
    try:
        errors = held_out(profile)
    except ProfileError as error:
        return str(error)
    return f"errors at points held out: median {errors.median:.1%}, worst {errors.worst:.1%} ({errors.worst_operation})"
