"""Outlook: the predicted peak of page use, if one more request is let in."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanoflow_backend.scheduler.forecast import Forecast, peak_pages
from nanoflow_backend.scheduler.page_account import PageAccount
from nanoflow_backend.scheduler.sequence import Sequence, State


class Outlook:
    """The sequences that hold pages, each with the tokens it will still add. Made for one step, and grown in it."""

    def __init__(self, sequences: Iterable[Sequence], account: PageAccount, forecast: Forecast) -> None:
        self._account = account
        self._forecast = forecast
        private_pages = 0
        held, produced, max_tokens = [], [], []
        for s in sequences:
            tokens = max(s.computed, len(s.tokens))
            private_pages += len(s.pages) - s.shared_pages
            held.append(tokens - s.shared_pages * account.page_tokens)
            produced.append(tokens - s.prompt_tokens)
            end = tokens if s.state is State.LEAVING else s.max_total_tokens
            max_tokens.append(end - s.prompt_tokens)
        self._unowned_pages = account.pool.used - private_pages  # shared ones whose first holder has left
        self._held = np.array(held, np.int64)
        self._remaining = self._forecast.remaining(np.array(produced, np.int64), np.array(max_tokens, np.int64))

    def add(self, sequence: Sequence, cost_pages: int) -> float:
        """Count a waiting sequence that would take `cost_pages` now. Returns the peak of page use."""
        pages = self._account.pages_for(sequence)
        held = len(sequence.tokens) - (pages - cost_pages) * self._account.page_tokens
        remaining = self._forecast.remaining(
            np.array([sequence.output_tokens]), np.array([sequence.max_total_tokens - sequence.prompt_tokens])
        )
        self._held = np.append(self._held, held)
        self._remaining = np.append(self._remaining, remaining)
        return self._unowned_pages + peak_pages(self._held, self._remaining, self._account.page_tokens)
