"""Request: what a client submits, as ints."""

from __future__ import annotations

import msgspec

from nanoflow_backend.scheduler.sampling_params import SamplingParams


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One prompt to continue; it crosses the socket to the engine process.

    A lower `priority` runs first; equal ones in order of arrival. `deadline` is in seconds of `time.monotonic()`
    (one clock for all processes of a host); a request that has not finished by then ends with "deadline". `arrived_s`
    is when its client's request came, by the same clock; None: when it is added.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    arrived_s: float | None = None
