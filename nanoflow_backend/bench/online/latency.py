"""Timed is a request with the times of its tokens; these functions say what many of them add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanoflow_backend.config.error import ConfigError

PERCENTILES = (50, 90, 99)
Times = NDArray[np.float64]


@dataclass
class Timed:
    """A request; times of time.perf_counter(), or of whatever clock its tokens are read by.

    Tokens that come together have one time. `failed` says why a request did not get all of them.
    """

    due_s: float  # when it was to be sent: latency counts from here
    sent_s: float
    output_tokens: int  # that were asked for
    token_s: list[float] = field(default_factory=list)
    failed: str | None = None

    @property
    def first_token_s(self) -> float:
        """TTFT, in seconds."""
        return self.token_s[0] - self.due_s

    @property
    def between_tokens_s(self) -> Times:
        """ITL, in seconds: one for each token but the first."""
        return np.diff(self.token_s)

    @property
    def normalized_s(self) -> float:
        """Seconds from when it was due to its last token, over its tokens (Orca, vLLM, NanoFlow)."""
        return (self.token_s[-1] - self.due_s) / len(self.token_s)


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count for goodput, in milliseconds (SLO); None: no such limit."""

    first_token_ms: float | None = None
    between_tokens_ms: float | None = None  # the mean over a request's tokens after the first (TPOT)

    def __post_init__(self) -> None:
        """Raises: ConfigError, naming the option."""
        for option, limit in (("--ttft-limit", self.first_token_ms), ("--itl-limit", self.between_tokens_ms)):
            if limit is not None and not limit > 0:
                raise ConfigError(f"{option}: expected milliseconds above 0, got {limit:g}")

    @property
    def any(self) -> bool:
        return self.first_token_ms is not None or self.between_tokens_ms is not None

    def kept(self, request: Timed) -> bool:
        """A failed request has kept none."""
        if request.failed is not None:
            return False
        if self.first_token_ms is not None and 1e3 * request.first_token_s > self.first_token_ms:
            return False
        gaps = request.between_tokens_s
        return self.between_tokens_ms is None or not len(gaps) or 1e3 * float(gaps.mean()) <= self.between_tokens_ms


def percentiles_ms(times_s: Times | Sequence[float]) -> dict[str, float]:
    """Of times in seconds, in milliseconds: linear between neighbours, as numpy does. Of no times: nothing."""
    if not len(times_s):
        return {}
    found = np.percentile(np.asarray(times_s), PERCENTILES)
    return {f"p{p}": round(1e3 * float(value), 3) for p, value in zip(PERCENTILES, found, strict=True)}


def with_mean_ms(times_s: Times | Sequence[float]) -> dict[str, float]:
    """The mean before the percentiles."""
    mean = {"mean": round(1e3 * float(np.mean(times_s)), 3)} if len(times_s) else {}
    return {**mean, **percentiles_ms(times_s)}


def between_tokens_s(requests: Sequence[Timed]) -> Times:
    """Of all requests together."""
    return np.concatenate([request.between_tokens_s for request in requests]) if requests else np.empty(0)


def open_loop_summary(
    requests: Sequence[Timed], measured: range, window_s: tuple[float, float], limits: Limits
) -> dict[str, Any]:
    """What a run came to whose `measured` requests were due within `window_s`; the others keep them company.

    Rates are of the window: tokens that came in it, whosever they are; requests that were due in it. Times are those
    of the measured requests that did not fail. `in_flight` are requests due before and not ended, at both ends of the
    window: more and more of them are an engine that cannot keep up.
    """
    begin_s, end_s = window_s
    own = [requests[number] for number in measured]
    whole = [request for request in own if request.failed is None]
    lateness_s = [request.sent_s - request.due_s for request in own]
    tokens = sum(begin_s <= time_s < end_s for request in requests for time_s in request.token_s)
    failures: dict[str, int] = {}
    for request in own:
        if request.failed is not None:
            failures[request.failed] = failures.get(request.failed, 0) + 1
    found: dict[str, Any] = {
        "requests": len(own),
        "failed": failures,
        "output_tokens_per_s": round(tokens / (end_s - begin_s), 2),
        "first_token_ms": with_mean_ms([request.first_token_s for request in whole]),
        "between_tokens_ms": with_mean_ms(between_tokens_s(whole)),
        "normalized_latency_ms": with_mean_ms([request.normalized_s for request in whole]),
        "in_flight": {"begin": _in_flight(requests, begin_s), "end": _in_flight(requests, end_s)},
        "lateness_ms": {**percentiles_ms(lateness_s), "max": round(1e3 * max(lateness_s), 3)},
    }
    if limits.any:
        kept = sum(map(limits.kept, own))
        found["goodput_per_s"] = round(kept / (end_s - begin_s), 4)
        found["goodput_share"] = round(kept / len(own), 4)
    return found


def _in_flight(requests: Sequence[Timed], at_s: float) -> int:
    return sum(
        request.due_s < at_s
        and request.failed is None
        and (len(request.token_s) < request.output_tokens or request.token_s[-1] >= at_s)
        for request in requests
    )
