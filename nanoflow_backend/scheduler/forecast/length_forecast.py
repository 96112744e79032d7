"""A Forecast says which share of the running requests still runs in t steps, learned from the outputs so far."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Shares = NDArray[np.float64]


class Forecast(Protocol):
    """The protocol of whatever estimates how likely requests are to run on."""

    def record(self, output_tokens: int) -> None:
        """A request has ended after so many tokens, for whatever reason."""

    def forget(self) -> None:
        """Know as little as at the start."""

    def update(self, running: Tokens) -> None:
        """Take in what was recorded, and the tokens that each running request has produced so far."""

    def survival(self, produced: Tokens, max_tokens: Tokens, ahead: Tokens) -> Shares:
        """[moments, requests]: the probability that a request that has produced s tokens reaches s + t.

        `produced` and `max_tokens` are [requests], `ahead` is [moments] of t, the first 0. Nobody goes beyond
        max_tokens.
        """


class LengthForecast:
    """P(L >= s + t | L > s) of the output length L, estimated as survival is (Kaplan and Meier, 1958).

    Of all requests that have reached a length, ended or still running, what share ended there? Counting the running
    ones matters: the first to end are the short ones. One more request, that never ends, is the prior: it goes to its
    max_tokens, before there is data as after outliving all others, and it fades as 1/n. The sum over t is
    E[L - s | L > s]: who is past the mean is expected to go on as those did that came as far.

    The histogram is halved when it holds `window` requests, so that it follows the workload.
    """

    def __init__(self, window: int = 4096) -> None:
        self._window = window
        self.forget()

    def forget(self) -> None:
        self._ended = np.zeros(1)  # by output length
        self._total = 0.0
        self._recorded = 0  # since the last update
        self._survival = np.ones(1)  # [s]: P(L > s)

    def record(self, output_tokens: int) -> None:
        if output_tokens >= len(self._ended):
            self._ended = np.append(self._ended, np.zeros(output_tokens))  # twice the length, or more
        self._ended[output_tokens] += 1
        self._total += 1
        self._recorded += 1
        if self._total >= self._window:
            self._ended /= 2
            self._total /= 2

    def update(self, running: Tokens) -> None:
        if self._recorded > self._total / 32:  # 3 % more data hardly changes the answer, and a table takes time
            longest = len(self._ended) - 1
            reached = self._ended + np.bincount(np.minimum(running, longest), minlength=longest + 1)
            reached = np.cumsum(reached[::-1])[::-1]
            self._survival = np.cumprod(1 - self._ended / (reached + 1))
            self._recorded = 0

    def survival(self, produced: Tokens, max_tokens: Tokens, ahead: Tokens) -> Shares:
        before = np.maximum(ahead - 1, 0)[:, None]  # it reaches s + t if it is longer than s + t - 1
        alive: Shares = self._survival.take(np.minimum(produced + before, len(self._survival) - 1))
        alive /= alive[0]
        alive *= produced + ahead[:, None] <= max_tokens
        return alive
