"""How many pages will the running requests need at their worst moment? Learned from the outputs that ended."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class Forecast(Protocol):
    """How much longer requests will run."""

    def record(self, output_tokens: int) -> None:
        """A request has ended by itself after so many tokens."""

    def remaining(self, produced: Tokens, max_tokens: Tokens) -> NDArray[np.float64]:
        """Expected further output tokens of requests that have produced `produced` of at most `max_tokens`."""


class LengthForecast:
    """A request that has produced s tokens is expected to run E[L - s | L > s] further.

    L is drawn from a running histogram of output lengths, with one more observation: a request that runs to its
    own max_tokens. That is the prior before there is data, the answer for a request that has outlived all others,
    and it fades as 1/n. The histogram is halved when it holds `window` requests, so that it follows the workload.
    """

    def __init__(self, window: int = 4096) -> None:
        self._window = window
        self._ended = np.zeros(1)  # by output length
        self._total = 0.0
        self._recorded = 0.0  # since the tables were made
        self._longer = np.zeros(1)  # [s]: how many ended after more than s tokens
        self._longer_tokens = np.zeros(1)  # [s]: the sum of their lengths

    def record(self, output_tokens: int) -> None:
        if output_tokens >= len(self._ended):
            self._ended = np.concatenate([self._ended, np.zeros(output_tokens)])
        self._ended[output_tokens] += 1
        self._total += 1
        self._recorded += 1
        if self._total >= self._window:
            self._ended /= 2
            self._total /= 2

    def remaining(self, produced: Tokens, max_tokens: Tokens) -> NDArray[np.float64]:
        if self._recorded > self._total / 32:  # 3 % more data does not change an answer; a new table takes time
            self._make_tables()
        s = np.minimum(produced, len(self._longer) - 1)  # nobody ended after more than the last entry
        expected: NDArray[np.float64] = (self._longer_tokens[s] + max_tokens) / (self._longer[s] + 1) - produced
        return np.minimum(expected, max_tokens - produced)

    def _make_tables(self) -> None:
        lengths = np.arange(len(self._ended))
        self._longer = _sum_beyond(self._ended)
        self._longer_tokens = _sum_beyond(self._ended * lengths)
        self._recorded = 0.0


class ReserveMaxTokens:
    """Every request is expected to run to its max_tokens: no preemption, and memory that nobody uses."""

    def record(self, output_tokens: int) -> None:
        pass

    def remaining(self, produced: Tokens, max_tokens: Tokens) -> NDArray[np.float64]:
        return (max_tokens - produced).astype(np.float64)


class ReserveNothing:
    """Every request is expected to end at once: a request is admitted when its prompt fits."""

    def record(self, output_tokens: int) -> None:
        pass

    def remaining(self, produced: Tokens, max_tokens: Tokens) -> NDArray[np.float64]:
        return np.zeros(len(produced))


def peak_pages(held_tokens: Tokens, remaining_tokens: NDArray[np.float64], page_tokens: int) -> float:
    """The most pages in use at any later step, if each request grows by a token per step until it ends.

    Both [requests]. Use only falls when a request ends, so the peak is just before one of the ends. A last page is
    half full on average.
    """
    order = np.argsort(-remaining_tokens)
    last_to_leave = remaining_tokens[order]
    requests = np.arange(1, len(order) + 1)
    tokens = np.cumsum(held_tokens[order]) + requests * last_to_leave
    return float(np.max(tokens / page_tokens + requests / 2, initial=0.0))


def _sum_beyond(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """[s]: the sum of values[s + 1:]."""
    return np.append(np.cumsum(values[:0:-1])[::-1], 0.0)
