"""Observed holds what a scheduler has measured since it began, as histograms and counts."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

# Upper bounds of buckets. One ladder for a request's times and one for a step's: 1 ms is faster than any first token,
# 250 s slower than what a client waits for.
REQUEST_TIMES_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0
)  # fmt: skip
STEP_TIMES_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0
)  # fmt: skip
TOKENS = tuple(float(2**power) for power in range(18))  # 1 .. 131,072
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Histogram(msgspec.Struct, array_like=True):
    """How many values fell at or below each bound and above the one before; the last count is of what is above all."""

    bounds: tuple[float, ...]
    counts: list[int] = []
    total: float = 0.0  # sum of all values

    def __post_init__(self) -> None:
        if not self.counts:
            self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


def _histogram(bounds: tuple[float, ...]) -> Histogram:
    histogram: Histogram = msgspec.field(default_factory=lambda: Histogram(bounds))
    return histogram


class Observed(msgspec.Struct):
    """Grows from the start of the scheduler. Times of whole requests are those of requests with a whole result."""

    queue_time_s: Histogram = _histogram(REQUEST_TIMES_S)  # arrival to first admission
    first_token_s: Histogram = _histogram(REQUEST_TIMES_S)  # arrival to first token
    prefill_time_s: Histogram = _histogram(REQUEST_TIMES_S)  # first admission to first token
    decode_time_s: Histogram = _histogram(REQUEST_TIMES_S)  # first token to end
    total_time_s: Histogram = _histogram(REQUEST_TIMES_S)  # arrival to end
    load_time_s: Histogram = _histogram(REQUEST_TIMES_S)  # admission to the last page from a lower tier
    prompt_tokens: Histogram = _histogram(TOKENS)
    output_tokens: Histogram = _histogram(TOKENS)
    inter_token_s: Histogram = _histogram(STEP_TIMES_S)  # from one token of a request to its next
    step_time_s: Histogram = _histogram(STEP_TIMES_S)  # from its launch, or the end of the step before, to its end
    dense_batch_fill: Histogram = _histogram(RATIOS)  # tokens of a step over dense_batch_tokens
    computed_tokens: int = 0  # of all steps
    delivered_tokens: int = 0  # sampled, and given to their requests
    host_tokens: int = 0  # known ones that were loaded from host memory instead of computed
    disk_tokens: int = 0  # likewise, from the disk
    ended: dict[str, int] = {}  # requests by finish reason
