"""A profile is measured point by point, each on file at once, so that a run that is cut goes on from the file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from msgspec.structs import replace

from nanoflow_backend.config.precision import BFLOAT16, Precision
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.file import fingerprint
from nanoflow_search.profile.data import Pair, Profile, ProfileHeader
from nanoflow_search.profile.load import Load, LoadRunner, Measurement, Point, ProfileError, SoloLoad

SECOND_CLOCK_DUTY = 0.5  # duty cycle of the second measurement, which lets the clock settle elsewhere
CAPPED = 0.97  # share of the highest clock: below it, the power cap is what holds the clock down


def profile_header(
    device: LoadRunner, graph: Graph, tensor_parallel: int = 1, precision: Precision = BFLOAT16
) -> ProfileHeader:
    """Return the header of a profile of `graph` (a layer of one rank) on `device`."""
    return ProfileHeader(
        model_fingerprint=fingerprint(graph),
        precision=precision,
        device=device.name,
        device_sms=device.sms,
        tensor_parallel=tensor_parallel,
        static_w=device.static_w,
        power_cap_w=device.power_cap_w,
    )


def take_profile(
    device: LoadRunner,
    header: ProfileHeader,
    alone: Iterable[SoloLoad],
    together: Iterable[tuple[Load, Load]],
    path: Path,
    progress: Callable[[str], None] = lambda _: None,
) -> Profile:
    """Return the profile in the file `path` with every load of `alone` and every pair of `together`.

    What the file holds is not measured again. Static power is that of the run that began the file.

    Raises:
        ProfileError: the file was taken of something else than `header` says.
    """
    profile = Profile.load(path) if path.exists() else Profile(header=header)
    if replace(profile.header, static_w=header.static_w) != header:
        raise ProfileError(f"{path}: was taken of {profile.header}, and here is {header}")

    def add_point(load: Load, busy: float, heated: bool) -> Point:
        nonlocal profile
        sms = load.sms or device.sms
        for point in profile.points:
            if (point.operation, point.amount, point.sms, point.busy, point.heated) == (*load[:2], sms, busy, heated):
                return point
        rest = "" if busy == 1 else f", {busy:.0%} of the time, {'heated' if heated else 'idle'} for the rest"
        progress(f"{load.operation} {load.amount:g} on {sms} SMs{rest}")
        point = _point(load, sms, device.time([load], busy, heated), profile.header.static_w, busy, heated)
        profile = replace(profile, points=(*profile.points, point))
        profile.save(path)
        return point

    for load, two_clocks in alone:
        point = add_point(load, 1.0, False)
        if two_clocks:
            add_point(load, SECOND_CLOCK_DUTY, heated=point.clock_mhz > CAPPED * device.highest_clock_mhz)
    known = {(p.first, p.first_sms, p.second, p.second_sms) for p in profile.pairs}
    for first, second in together:
        if (first.operation, first.sms, second.operation, second.sms) not in known:
            progress(f"{_describe(first)} beside {_describe(second)}")
            pair = _pair(profile, first, second, device.time([first, second]))
            profile = replace(profile, pairs=(*profile.pairs, pair))
            profile.save(path)
    return profile


def _describe(load: Load) -> str:
    return f"{load.operation} {load.amount:g} on {load.sms or 'all'} SMs"


def _point(load: Load, sms: int, found: Measurement, static_w: float, busy: float, heated: bool) -> Point:
    duration_us = found.durations_us[0]
    return Point(
        operation=load.operation,
        amount=float(load.amount),
        sms=sms,
        duration_us=duration_us,
        dynamic_j=max(found.power_w - static_w, 0.0) * duration_us * 1e-6,
        clock_mhz=found.clock_mhz,
        busy=busy,
        heated=heated,
    )


def _pair(profile: Profile, first: Load, second: Load, beside: Measurement) -> Pair:
    """Compare both loads with what each takes alone at the clock that they had side by side."""
    alone = [profile.surface(load.operation, beside.clock_mhz) for load in (first, second)]
    alone_us = [a.duration_us(load.amount, load.sms) for a, load in zip(alone, (first, second), strict=True)]
    alone_j = [a.dynamic_j(load.amount, load.sms) for a, load in zip(alone, (first, second), strict=True)]
    alone_w = sum(1e6 * joules / us for joules, us in zip(alone_j, beside.durations_us, strict=True))
    slowdowns = [max(us / apart, 1.0) for us, apart in zip(beside.durations_us, alone_us, strict=True)]
    return Pair(
        first=first.operation,
        first_sms=first.sms,
        second=second.operation,
        second_sms=second.sms,
        first_slowdown=slowdowns[0],
        second_slowdown=slowdowns[1],
        power_w=beside.power_w,
        clock_mhz=beside.clock_mhz,
        energy_ratio=max(beside.power_w - profile.header.static_w, 0.0) / alone_w if alone_w else 1.0,
    )
