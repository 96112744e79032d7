"""Request is what a client submits to the engine: a prompt in token ids, sampling parameters, deadlines."""

from __future__ import annotations

import msgspec

from nanoflow_backend.request.sampling_params import SamplingParams


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One prompt to continue; it crosses the socket to the engine process.

    A lower `priority` runs first; equal ones in order of arrival. Moments are in seconds of `time.monotonic()` (one
    clock for all processes of a host): a request that has not finished by `deadline` ends with "deadline", one that
    has not begun by `queue_deadline` with "queue_timeout". `arrived_s` is when its client's request came; None: when it
    is added.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    queue_deadline: float | None = None
    arrived_s: float | None = None
