"""An Account says what one request took: time in the queue, prefilling and decoding, pages, and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec


@dataclass(slots=True, eq=False)
class OpenAccount:
    """Of a request that has not ended. Apart from its sequence: every step reads a thousand of those.

    Moments are in seconds of the scheduler's clock.
    """

    arrived_s: float = 0.0
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0  # of meaning while it pauses
    energy_j: float = 0.0
    decode_mark_j: float | None = None  # while it decodes: the observer's sum at the start
    load_began_s: float = 0.0  # of meaning while it loads pages
    host_tokens: int = 0
    disk_tokens: int = 0


class Account(msgspec.Struct, frozen=True, array_like=True):
    """Moments are in seconds of `time.monotonic()`; None: it never came to that."""

    arrived_s: float
    admitted_s: float | None  # for the first time
    first_token_s: float | None  # when the step that sampled it came back
    ended_s: float
    peak_pages: int  # of the KV cache, those shared with others too; of several sequences the sum
    energy_j: float | None  # its tokens' share of what the device used; None where nothing measures that
    host_tokens: int = 0  # of the prompt, whose pages were loaded from host memory instead of computed
    disk_tokens: int = 0  # likewise, from the disk

    @classmethod
    def joined(cls, accounts: Sequence[Account]) -> Account:
        """Of the sequences of one request, at least one: from the first's moments to the last's end."""
        admitted_s = [a.admitted_s for a in accounts if a.admitted_s is not None]
        first_token_s = [a.first_token_s for a in accounts if a.first_token_s is not None]
        energies_j = [a.energy_j for a in accounts if a.energy_j is not None]
        return cls(
            arrived_s=accounts[0].arrived_s,
            admitted_s=min(admitted_s, default=None),
            first_token_s=min(first_token_s, default=None),
            ended_s=max(a.ended_s for a in accounts),
            peak_pages=sum(a.peak_pages for a in accounts),
            energy_j=sum(energies_j) if energies_j else None,
            host_tokens=max(a.host_tokens for a in accounts),
            disk_tokens=max(a.disk_tokens for a in accounts),
        )

    @property
    def queue_time_s(self) -> float:
        return (self.ended_s if self.admitted_s is None else self.admitted_s) - self.arrived_s

    @property
    def prefill_time_s(self) -> float:
        if self.admitted_s is None:
            return 0.0
        return (self.ended_s if self.first_token_s is None else self.first_token_s) - self.admitted_s

    @property
    def decode_time_s(self) -> float:
        return 0.0 if self.first_token_s is None else self.ended_s - self.first_token_s

    @property
    def total_time_s(self) -> float:
        return self.ended_s - self.arrived_s
