"""take_profile: measure what is still missing of a profile, point by point; a run that is cut goes on from its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from msgspec.structs import replace

from nanoflow_search.profile import Device, Header, Load, Pair, Point, Profile, ProfileError


def take_profile(
    device: Device,
    header: Header,
    alone: Iterable[Load],
    together: Iterable[tuple[Load, Load]],
    path: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """The profile in `path` with every load of `alone` at every clock level of the device, and every pair.

    Raises:
        ProfileError: the file is of something else than `header`.
    """
    profile = Profile.load(path) if path.exists() else Profile(header=header)
    if profile.header != header:
        raise ProfileError(f"{path}: was taken of {profile.header}, and here is {header}")
    known = {(p.operation, p.amount, p.sms, p.limit_mhz) for p in profile.points}
    for load in alone:
        for limit in device.clocks_mhz:
            if (load.operation, load.amount, load.sms or device.sms, limit) not in known:
                progress(f"{load.operation} {load.amount:g} on {load.sms or device.sms} SMs, {limit:g} MHz")
                profile = replace(profile, points=(*profile.points, measure_alone(device, load, limit)))
                profile.save(path)
    paired = {(p.first, p.first_sms, p.second, p.second_sms) for p in profile.pairs}
    for first, second in together:
        if (first.operation, first.sms, second.operation, second.sms) not in paired:
            progress(f"{first.operation} beside {second.operation}")
            profile = replace(profile, pairs=(*profile.pairs, measure_pair(device, first, second)))
            profile.save(path)
    return profile


def measure_alone(device: Device, load: Load, limit_mhz: float) -> Point:
    found = device.time([load], limit_mhz)
    duration_us = found.durations_us[0]
    return Point(
        operation=load.operation,
        amount=float(load.amount),
        sms=load.sms or device.sms,
        duration_us=duration_us,
        dynamic_j=(found.power_w - device.static_w) * duration_us * 1e-6,
        clock_mhz=found.clock_mhz,
        limit_mhz=limit_mhz,
    )


def measure_pair(device: Device, first: Load, second: Load) -> Pair:
    """Both slowdowns of two loads side by side, against each alone with the same cap."""
    alone = [device.time([load]).durations_us[0] for load in (first, second)]
    beside = device.time([first, second])
    slowdowns: Sequence[float] = [max(b / a, 1.0) for a, b in zip(alone, beside.durations_us, strict=True)]
    return Pair(
        first=first.operation,
        first_sms=first.sms,
        second=second.operation,
        second_sms=second.sms,
        first_slowdown=slowdowns[0],
        second_slowdown=slowdowns[1],
        power_w=beside.power_w,
        clock_mhz=beside.clock_mhz,
    )
