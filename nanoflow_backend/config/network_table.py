"""NetworkTable says what collectives take among the ranks of a machine: a file of measurements, or an assumed rate.

{"header": {"format_version": 1, "name": "NCCL", "device": "NVIDIA H200", "ranks": 8, "source": "..."},
 "times": [{"collective": "all_reduce", "bytes": 33554432, "sms": 24, "us": 210.0}, ...]}
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec

from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.file import convert, read_json

FORMAT_VERSION = 1
ROUNDING_US = 1e-6

Collective = Literal["all_reduce", "reduce_scatter", "all_gather"]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Range = tuple[Annotated[float, msgspec.Meta(ge=0)], Annotated[float, msgspec.Meta(ge=0)]]

# A ring's all-reduce is a reduce-scatter and an all-gather, which send as many bytes each.
PASSES: Mapping[Collective, int] = {"all_reduce": 2, "reduce_scatter": 1, "all_gather": 1}


class NetworkHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the times come from, and what of a network they do not show."""

    format_version: int = FORMAT_VERSION
    name: str  # "NCCL 2.28.9"
    device: str  # "NVIDIA H200"
    ranks: Annotated[int, msgspec.Meta(ge=2, le=2**16)]
    source: str  # who measured, when and how; or that nobody did
    link_pj_per_byte: Range | None = None  # energy of a byte that a rank sends, beside what its memory takes: low, high
    rank_skew: Range | None = None  # how far the slowest rank is behind the mean, as a share of a step: low, high


class CollectiveTime(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One collective on `bytes`: of what each rank has before it is summed, or has when all is gathered."""

    collective: Collective
    bytes: Count
    sms: Count  # that it runs on
    us: Positive
    power_w: Positive | None = None  # of a whole device meanwhile


class Taken(NamedTuple):
    """What a collective takes."""

    us: float
    sms: int


class NetworkTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Times of collectives by size, for one or more numbers of SMs.

    Raises:
        ConfigError: a collective with fewer than two sizes on as many SMs, or whose time does not grow with its size.
    """

    header: NetworkHeader
    times: tuple[CollectiveTime, ...]

    def __post_init__(self) -> None:
        low_high = {"link_pj_per_byte": self.header.link_pj_per_byte, "rank_skew": self.header.rank_skew}
        for name, limits in low_high.items():
            if limits is not None and limits[0] > limits[1]:
                raise ConfigError(f"header.{name}: expected low and high, got {list(limits)}")
        if not any(time.collective == "all_reduce" for time in self.times):
            raise ConfigError("times: expected those of all_reduce at least, got none")
        for (collective, sms), points in self._curves.items():
            _check_curve(f"times: {collective} on {sms} SMs", points)

    @classmethod
    def load(cls, path: Path) -> NetworkTable:
        """Raises: ConfigError, naming the file and the place in it."""
        fields = read_json(path)
        header = fields.get("header")
        version = header.get("format_version", FORMAT_VERSION) if isinstance(header, dict) else FORMAT_VERSION
        if version != FORMAT_VERSION:
            raise ConfigError(f"{path}: format version {version}, this release reads {FORMAT_VERSION}")
        return convert(fields, cls, str(path))

    @classmethod
    def at_rate(cls, header: NetworkHeader, sms: int, gb_per_s: float) -> NetworkTable:
        """A network on which each rank sends at `gb_per_s` (10^9 bytes a second: NCCL's bus bandwidth) from `sms` SMs,
        however little it sends."""
        times = [
            CollectiveTime(
                collective=collective,
                bytes=size,
                sms=sms,
                us=sent_bytes(collective, size, header.ranks) / (1e3 * gb_per_s),
            )
            for collective in PASSES
            for size in (2**20, 2**30)
        ]
        return cls(header=header, times=tuple(times))

    def time(self, collective: Collective, size: int, num_sms: int | None = None) -> Taken:
        """What a collective on `size` bytes takes.

        It runs on the most SMs that the table has for it and `num_sms` (None: any number) allows, or on the fewest it
        has. Times lie on straight lines between sizes, and on the line of the nearest two beyond them. A form that the
        table does not have takes half of an all-reduce.
        """
        passes = 1.0
        choices = [sms for name, sms in self._curves if name == collective]
        if not choices:
            passes, collective = PASSES[collective] / PASSES["all_reduce"], "all_reduce"
            choices = [sms for name, sms in self._curves if name == collective]
        sms = max((sms for sms in choices if num_sms is None or sms <= num_sms), default=min(choices))
        return Taken(passes * _on_lines(self._curves[collective, sms], size), sms)

    @cached_property
    def _curves(self) -> dict[tuple[Collective, int], list[tuple[int, float]]]:
        """By collective and SMs, (bytes, microseconds) by size."""
        curves: defaultdict[tuple[Collective, int], list[tuple[int, float]]] = defaultdict(list)
        for time in sorted(self.times, key=lambda time: time.bytes):
            curves[time.collective, time.sms].append((time.bytes, time.us))
        return dict(curves)


def sent_bytes(collective: Collective, size: int, ranks: int) -> float:
    """What each rank sends in a collective on `size` bytes: NCCL's bus bytes."""
    return PASSES[collective] * size * (ranks - 1) / ranks


def _check_curve(name: str, points: Sequence[tuple[int, float]]) -> None:
    if len(points) < 2:
        raise ConfigError(f"{name}: expected two sizes or more, got {len(points)}")
    for (size, us), (larger, longer) in pairwise(points):
        if size == larger or us >= longer:
            raise ConfigError(f"{name}: expected times that grow with sizes, got {us} us for {size} bytes and {longer}")
    if _on_lines(points, 0) < -ROUNDING_US:
        raise ConfigError(f"{name}: its first two times make a line that is below 0 for no bytes; add a smaller size")


def _on_lines(points: Sequence[tuple[int, float]], size: int) -> float:
    last = next((i for i, (larger, _) in enumerate(points) if i and size <= larger), len(points) - 1)
    (size_0, us_0), (size_1, us_1) = points[last - 1 : last + 1]
    return us_0 + (us_1 - us_0) * (size - size_0) / (size_1 - size_0)
