"""HostMemory is what lies behind a pretended device, and PretendLink the way there: pages that only take time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.tier import Move, Transfer, TransferReport
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.tiers.rates import Rates


@dataclass(frozen=True)
class HostMemory:
    """Of a host behind the device; both directions of the link work at once."""

    tokens: int
    load_token_s: float = 131072 / 51e9  # Llama-3-8B in bf16 has 128 KiB a token; 8 SMs of an H200 read 51 GB/s
    store_token_s: float = 131072 / 52e9
    store_pages: int = 128  # that a step may begin to store
    loads_only: bool = False  # nothing that can be loaded is computed meanwhile

    def tiers(self, page_tokens: int, clock: Callable[[], float]) -> LowerTiers:
        """What decides which pages move."""
        tier = HostTier()
        tier.grow(self.tokens // page_tokens)
        most = TierLimits(store_pages=self.store_pages, load_pages=1024)
        return LowerTiers(tier, most, (_LoadsOnly if self.loads_only else Rates)(page_tokens), clock=clock)


class _LoadsOnly(Rates):
    """As if loading took no time."""

    def pages_to_compute(self, pages: int, on_their_way: int, disk_pages: int, waited_s: float = 0.0) -> int:
        return 0


class PretendLink:
    """Moves pages between the device and host memory: of one direction, each begins when the one before has ended."""

    def __init__(self, host: HostMemory, page_tokens: int) -> None:
        self._slots = host.tokens // page_tokens
        self._page_s = dict.fromkeys(Move, 0.0)
        self._page_s[Move.LOAD] = host.load_token_s * page_tokens
        self._page_s[Move.STORE] = host.store_token_s * page_tokens
        self._free_at_s = dict.fromkeys(Move, 0.0)
        self._moving: deque[tuple[float, Transfer]] = deque()

    @property
    def next_end_s(self) -> float | None:
        """When the next transfer ends; None: there is none."""
        return min((ends_s for ends_s, _ in self._moving), default=None)

    def begin(self, transfers: Iterable[Transfer], now_s: float) -> None:
        for transfer in transfers:
            begins_s = max(now_s, self._free_at_s[transfer.move])
            self._free_at_s[transfer.move] = begins_s + self._page_s[transfer.move]
            self._moving.append((self._free_at_s[transfer.move], transfer))

    def report(self, now_s: float) -> TransferReport:
        """What has ended by now."""
        ended = [transfer for ends_s, transfer in self._moving if ends_s <= now_s]
        self._moving = deque(moving for moving in self._moving if moving[0] > now_s)
        seconds = tuple(self._page_s[move] * sum(t.move is move for t in ended) for move in Move)
        return TransferReport([transfer.id for transfer in ended], [], self._slots, seconds)
