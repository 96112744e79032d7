"""These are two simple rules of admission, with which the simulator compares the forecast of lengths."""

from __future__ import annotations

import numpy as np

from nanoflow_backend.scheduler.forecast.length_forecast import Shares, Tokens


class ReserveMaxTokens:
    """Every request runs to its max_tokens: no preemption, and memory that nobody uses."""

    def record(self, output_tokens: int) -> None:
        pass

    def forget(self) -> None:
        pass

    def update(self, running: Tokens) -> None:
        pass

    def survival(self, produced: Tokens, max_tokens: Tokens, ahead: Tokens) -> Shares:
        return (produced + ahead[:, None] <= max_tokens).astype(np.float64)


class ReserveNothing:
    """Every request ends at once: it is admitted when its prompt fits."""

    def record(self, output_tokens: int) -> None:
        pass

    def forget(self) -> None:
        pass

    def update(self, running: Tokens) -> None:
        pass

    def survival(self, produced: Tokens, max_tokens: Tokens, ahead: Tokens) -> Shares:
        return np.repeat(ahead[:, None] == 0, len(produced), axis=1).astype(np.float64)
