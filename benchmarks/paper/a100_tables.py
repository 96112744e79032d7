"""The published tables become A100-like profiles.

NanoFlow's authors published solo times in their LLaMA-2-70B (TP 8) and Llama-3-8B notebooks, and two tables of R -> P
(what a share of the SMs leaves of an operation's performance), which disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from nanoflow_search.predict.timing_model import RunningCurve, TimingModel
from nanoflow_search.profile.data import Pair, Profile, ProfileHeader
from nanoflow_search.profile.load import Point

from nanoflow_backend.config.precision import BFLOAT16
from nanoflow_backend.graph.operation import Graph
from nanoflow_backend.schedule.file import fingerprint

SMS = 108
CONTEXT = 1024.0  # of the decodes whose attention was timed

# Operation -> tokens -> microseconds.
LLAMA_2_70B_TP8 = {
    "qkv": {256: 86.0, 384: 100.0, 640: 155.0, 768: 162.0},
    "attention/decode": {256: 116.0, 512: 196.0, 1408: 483.0},
    "attention/prefill": {768: 38.0},
    "o": {640: 58.0, 1408: 104.0},
    "gate_up": {640: 287.0, 1408: 587.0},
    "down": {640: 138.0, 1408: 313.0},
    "attention_reduce": {640: 150.0, 1408: 278.0},
    "mlp_reduce": {640: 150.0, 1408: 278.0},
}
LLAMA_3_8B = {
    "qkv": {384: 84.0, 640: 138.0},
    "attention/decode": {384: 997.0},
    "attention/prefill": {640: 63.0},
    "o": {384: 56.0, 640: 89.0},
    "gate_up": {384: 356.0, 640: 555.0},
    "down": {384: 177.0, 640: 270.0},
}
GEMMS = ("qkv", "o", "gate_up", "down")
NETWORK = ("attention_reduce", "mlp_reduce")

# R -> P at tenths of the SMs.
GEMM = {share / 10: share / 10 for share in range(1, 11)}
# Table 3 and the text of section 4.1.4; where the paper leaves the middle out, the later release's; never falling.
PUBLISHED = {
    "attention": dict(zip(GEMM, (0.2, 0.3, 0.5, 0.8, 0.8, 0.8, 0.85, 0.85, 0.95, 1.0), strict=True)),
    "network": dict(zip(GEMM, (0.3, 0.5, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 1.0, 1.0), strict=True)),
}
# The later release's tables alone; the network's ends at one half.
RELEASE = {
    "attention": dict(zip(GEMM, (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0), strict=True)),
    "network": dict(zip(GEMM, (0.4, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 1.0), strict=True)),
}


def profile(graph: Graph, ranks: int, times_us: Mapping[str, Mapping[int, float]], tables: dict = PUBLISHED) -> Profile:
    """Return a profile: a straight line through each operation's times, shares by the tables, and no power cap.

    Element-wise operations take no time: the published times are those of fused kernels. Any two shares that fit into
    the device leave each other alone, as the paper assumes.
    """
    points: list[Point] = []
    for name, measured in times_us.items():
        table = GEMM if name in GEMMS else tables["network" if name in NETWORK else "attention"]
        per_token = CONTEXT if "/" in name else 1.0
        for tokens in (128.0, 2048.0):
            for share, performance in table.items():
                us = line(measured, tokens) / performance
                points.append(point(name, tokens * per_token, round(share * SMS), us))
    timed = {name.partition("/")[0] for name in times_us}
    rest = [op.name for op in graph.operations if op.name not in timed]
    points += [point(name, 1.0, round(share * SMS), 0.0) for name in rest for share in GEMM]
    mains = [name for name in ("qkv", "o", "gate_up", "attention", *NETWORK) if name in timed]
    lanes = {name: "network" if name in NETWORK else "memory" if name == "attention" else "compute" for name in mains}
    shares = [round(share * SMS) for share in GEMM]
    pairs = [
        pair(first, a, second, b)
        for i, first in enumerate(mains)
        for second in mains[i + 1 :]
        if lanes[first] != lanes[second]
        for a in shares
        for b in shares
        if a + b <= SMS
    ]
    header = ProfileHeader(
        model_fingerprint=fingerprint(graph),
        precision=BFLOAT16,
        device="A100, from published tables",
        device_sms=SMS,
        tensor_parallel=ranks,
        static_w=0.0,
        power_cap_w=1e9,
    )
    return Profile(header=header, points=tuple(points), pairs=tuple(pairs))


def resource_to_performance(profile: Profile, operation: str, amount: float) -> dict[float, float]:
    """The paper's table: the share of the SMs, R -> the performance that it leaves of the best alone, P."""
    surface = profile.surface(operation)
    best = min(surface.duration_us(amount, sms) for sms in surface.shares)
    return {sms / profile.header.device_sms: best / surface.duration_us(amount, sms) for sms in surface.shares}


class Published(TimingModel):
    """The timing model that shares the device as the paper defines R.

    A GEMM without a limit of SMs keeps what the others do not take, as long as they run. All others are as fast as P
    says. Where the Rs sum up to more than 1, loads run in turns.
    """

    def slowdowns(self, running: Sequence[RunningCurve]) -> tuple[float, ...]:
        taken = [0.0 if sms is None and curve in GEMMS else round((sms or SMS) / SMS, 1) for curve, sms in running]
        left = round(1 - sum(taken), 1)
        rest = 1 / left if left > 0 else math.inf
        return tuple(max(1.0, 1 - left) if share else rest for share in taken)


def line(measured: Mapping[int, float], tokens: float) -> float:
    """Return the value of the least-squares line at `tokens`; of a single time, in proportion."""
    if len(measured) == 1:
        [(at, us)] = measured.items()
        return us * tokens / at
    slope, fixed = np.polyfit(list(measured), list(measured.values()), 1)
    return float(fixed + slope * tokens)


def point(name: str, amount: float, sms: int, us: float) -> Point:
    return Point(operation=name, amount=amount, sms=sms, duration_us=us, dynamic_j=0.0, clock_mhz=1410)


def pair(first: str, a: int, second: str, b: int) -> Pair:
    return Pair(
        first=first,
        first_sms=a,
        second=second,
        second_sms=b,
        first_slowdown=1.0,
        second_slowdown=1.0,
        power_w=0.0,
        clock_mhz=1410,
    )
