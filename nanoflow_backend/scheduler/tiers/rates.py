"""Rates are measured: how fast pages are loaded, and how fast tokens are computed instead."""

from __future__ import annotations

from dataclasses import dataclass, field

MEMORY = 0.9  # what a measurement keeps of its weight when the next one comes


@dataclass(slots=True)
class Rate:
    """Seconds a unit, over the last ten measurements or so; None before the first."""

    _units: float = 0.0
    _seconds: float = 0.0

    def measured(self, units: float, seconds: float) -> None:
        """So many took so long."""
        if units > 0 and seconds > 0:
            self._units = MEMORY * self._units + units
            self._seconds = MEMORY * self._seconds + seconds

    @property
    def seconds_each(self) -> float | None:
        return self._seconds / self._units if self._units else None


@dataclass(slots=True)
class Rates:
    """What decides between loading a page and computing it."""

    page_tokens: int
    load: Rate = field(default_factory=Rate)  # a page, from host memory
    read: Rate = field(default_factory=Rate)  # a page, from the disk
    store: Rate = field(default_factory=Rate)  # a page, to host memory
    prefill: Rate = field(default_factory=Rate)  # a token, in a step with prompts
    step: Rate = field(default_factory=Rate)  # a step

    def pages_to_compute(self, pages: int, on_their_way: int, disk_pages: int, waited_s: float = 0.0) -> int:
        """Of `pages` that can be loaded or computed, how many to compute so that both end at the same time.

        0 before the rates are known, for a load takes no step's time; and where all loads end before the next step
        would begin: computing would only take room from others.

        Args:
            on_their_way: pages that are loaded before those.
            disk_pages: of all these, those that come from the disk.
            waited_s: without a page, as of the last look: so a link that has become slower is noticed.
        """
        compute, load = self.prefill.seconds_each, self.load.seconds_each
        if compute is None or load is None or not pages:
            return 0
        waiting = pages + on_their_way
        compute_s = compute * self.page_tokens
        load_s = max(load + (self.read.seconds_each or 0.0) * min(1.0, disk_pages / waiting), waited_s)
        if waiting * load_s < (self.step.seconds_each or 0.0):
            return 0
        fewer = min(pages, int(waiting * load_s / (load_s + compute_s)))
        if fewer < pages and (fewer + 1) * compute_s < (waiting - fewer) * load_s:
            return fewer + 1
        return fewer

    def compute_s(self, pages: int) -> float | None:
        """What it takes to compute so many pages; None: not known yet."""
        each = self.prefill.seconds_each
        return None if each is None else pages * self.page_tokens * each

    def is_swap_cheaper(self, pages: int) -> bool:
        """Whether storing and loading pages takes less time than computing them again; True before both are known."""
        compute, load, store = self.prefill.seconds_each, self.load.seconds_each, self.store.seconds_each
        if compute is None or (load is None and store is None):
            return True
        each = (load if load is not None else store or 0.0) + (store if store is not None else load or 0.0)
        return pages * each < pages * compute * self.page_tokens
