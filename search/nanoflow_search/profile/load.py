"""A load is an operation that runs again and again on a given amount of work: what a profile measures.

The *amount* is what an operation's time grows with. It is counted in tokens for most operations, in keys that are read
for decode attention (curve `attention/decode`), and in pairs of query and key for prefill attention
(`attention/prefill`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec


class ProfileError(ValueError):
    """A profile cannot be used: the message names the file or the operation, and what is missing."""


class Load(NamedTuple):
    """An operation to run back to back, on `amount` of its unit."""

    operation: str  # or one of attention's two curves
    amount: float
    sms: int | None = None  # the most SMs that it may use; None: all of the device


class SoloLoad(NamedTuple):
    """A load to measure alone; at two clocks, to see how the operation depends on the clock."""

    load: Load
    two_clocks: bool = False


class LoadsToMeasure(NamedTuple):
    """All that a profile is to hold: loads alone, and pairs of loads side by side."""

    alone: tuple[SoloLoad, ...]
    together: tuple[tuple[Load, Load], ...]


class Measurement(NamedTuple):
    """What was seen of loads that ran side by side, each back to back with itself, in the sustained state."""

    durations_us: tuple[float, ...]  # of one launch of each load, beside the others
    power_w: float  # of the whole device while they run
    clock_mhz: float  # at which the power cap held the SMs


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One load as it was measured alone."""

    operation: str
    amount: float
    sms: int  # granted
    duration_us: float  # of one launch
    dynamic_j: float  # of one launch, beyond static power
    clock_mhz: float  # at which the power cap held the SMs
    busy: float = 1.0  # the duty cycle, see LoadRunner.time
    heated: bool = False


class LoadRunner(Protocol):
    """Runs loads and measures them: a GPU, or a synthetic device. Its clock cannot be set; it follows power."""

    @property
    def name(self) -> str:
        """The name of the device."""
        ...

    @property
    def sms(self) -> int:
        """The SMs of the device."""
        ...

    @property
    def static_w(self) -> float:
        """The power that SMs draw while they are awake and do nothing useful."""
        ...

    @property
    def power_cap_w(self) -> float:
        """The power that the device never exceeds."""
        ...

    @property
    def highest_clock_mhz(self) -> float:
        """The clock of SMs that no power cap holds down."""
        ...

    def time(self, loads: Sequence[Load], busy: float = 1.0, heated: bool = False) -> Measurement:
        """Run `loads` side by side until times, power and clock are steady, and measure them.

        A single load may run in bursts, for a share `busy` of the time only. For the rest the device is idle, and the
        power cap allows a higher clock; or the device is `heated` by the work that draws most power, and the clock is
        lower.

        Raises:
            ProfileError: the model has no such operation.
        """
        ...
