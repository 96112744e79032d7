"""The interfaces say what a search needs of a machine, a power meter and repeated work; they import no torch."""

from __future__ import annotations

from typing import Protocol

from nanoflow_backend.runtime.gpu_meter import GpuReading
from nanoflow_search.cost.workload import Mix
from nanoflow_search.predict.predict import Timer
from nanoflow_search.profile.load import LoadRunner
from nanoflow_search.request import SearchRequest


class Machine(Protocol):
    """Measures loads and schedules: a GPU, or the synthetic device in its place."""

    name: str  # of the device, as profiles and schedule files have it

    def load_runner(self, request: SearchRequest, mix: Mix) -> LoadRunner:
        """Return what a profile is measured with; attention has the contexts of `mix`."""
        ...

    def timer(self, request: SearchRequest, mix: Mix, *, num_layers: int | None = None, seconds: float = 1.0) -> Timer:
        """Return a timer of schedules for batches of `mix`, which measures each run for some seconds.

        `num_layers` are run; None: as many as the model has.
        """
        ...


class PowerMeter(Protocol):
    """Reads a GPU's energy counter and clock."""

    @property
    def power_limit_w(self) -> float:
        """The power cap."""
        ...

    @property
    def highest_sm_clock_mhz(self) -> float:
        """The clock of SMs that no power cap holds down."""
        ...

    def read(self) -> GpuReading:
        """Return time, energy and clock of this moment."""
        ...


class Burst(Protocol):
    """Work that was queued on a device at once."""

    def ended(self) -> bool:
        """Return whether the device has finished it."""
        ...

    def took_s(self) -> float:
        """Wait until the device has finished it, and return how long it ran."""
        ...


class RepeatedWork(Protocol):
    """Work that runs again and again, in order with itself; other work may run beside it."""

    @property
    def calls(self) -> int:
        """The number of calls in a burst."""
        ...

    def launch(self, after: Burst | None = None) -> Burst:
        """Queue a burst, which does not begin before `after` has ended."""
        ...
