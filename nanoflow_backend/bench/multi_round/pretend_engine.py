"""PretendEngine is the real scheduler on a device, links and tiers that only take time: seconds pass as it says."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from msgspec.structs import replace

from nanoflow_backend.bench.multi_round.bound import StepCost
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.tier import Move, Transfer, TransferReport
from nanoflow_backend.request.request import Request
from nanoflow_backend.scheduler.batch import Batch, Delta, Sampled
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.scheduler import Scheduler
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.tiers.rates import Rates

WORD = 1  # every token of every answer


@dataclass(frozen=True)
class HostMemory:
    """Of a host behind the device; both directions of the link work at once."""

    tokens: int
    load_token_s: float = 131072 / 51e9  # Llama-3-8B in bf16 has 128 KiB a token; 8 SMs of an H200 read 51 GB/s
    store_token_s: float = 131072 / 52e9
    store_pages: int = 128  # that a step may begin to store
    loads_only: bool = False  # nothing that can be loaded is computed meanwhile


class LoadsOnly(Rates):
    """As if loading took no time."""

    def pages_to_compute(self, pages: int, on_their_way: int, disk_pages: int, waited_s: float = 0.0) -> int:
        return 0


class PretendEngine:
    """Results come back one step late, as in the engine; a step that computes nothing ends with the next transfer."""

    def __init__(
        self, limits: SchedulerLimits, cost: StepCost, host: HostMemory | None = None, *, prefix_caching: bool = True
    ) -> None:
        self.now_s = 0.0
        self.steps = self.computed_tokens = self.computed_prompt_tokens = 0
        self._cost, self._host = cost, host
        self._page_tokens = limits.page_tokens
        self._free_at_s = dict.fromkeys(Move, 0.0)
        self._moving: deque[tuple[float, Transfer]] = deque()
        self._in_flight: deque[Sampled] = deque()
        lower = None
        if host is not None:
            tier = HostTier()
            tier.grow(host.tokens // limits.page_tokens)
            most = TierLimits(store_pages=host.store_pages, load_pages=1024)
            rates = (LoadsOnly if host.loads_only else Rates)(limits.page_tokens)
            lower = LowerTiers(tier, most, rates, clock=self.clock)
        self.scheduler = Scheduler(
            limits, eos_token_ids=[], prefix_caching=prefix_caching, clock=self.clock, lower=lower
        )

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def step(self) -> list[Delta]:
        """The next step, and what the one before has sampled."""
        batch = self.scheduler.schedule()
        if batch is not None:
            self._run(batch)
        wait = len(self._in_flight) > (batch is not None and batch.tokens > 0)
        # what has moved is told as of now: the engine asks when it collects
        return self.scheduler.retire(replace(self._in_flight.popleft(), transfers=self._report()) if wait else None)

    def _run(self, batch: Batch) -> None:
        self._begin(batch.transfers)
        if batch.tokens:
            self.now_s += self._cost.of(batch.tokens, batch.decode_kv_tokens)
        elif self._moving:
            self.now_s = max(self.now_s, min(ends_s for ends_s, _ in self._moving))
        self.steps += 1
        self.computed_tokens += batch.tokens
        self.computed_prompt_tokens += sum(len(prefill.token_ids) for prefill in batch.prefills)
        self._in_flight.append(Sampled(batch.step, [WORD] * len(batch.sampled_slots)))

    def _begin(self, transfers: list[Transfer]) -> None:
        """Of one direction, each begins when the one before has ended."""
        for transfer in transfers:
            begins_s = max(self.now_s, self._free_at_s[transfer.move])
            self._free_at_s[transfer.move] = begins_s + self._page_s(transfer.move)
            self._moving.append((self._free_at_s[transfer.move], transfer))

    def _report(self) -> TransferReport | None:
        """What has ended by now."""
        if self._host is None:
            return None
        ended = [transfer for ends_s, transfer in self._moving if ends_s <= self.now_s]
        self._moving = deque(moving for moving in self._moving if moving[0] > self.now_s)
        seconds = tuple(self._page_s(move) * sum(t.move is move for t in ended) for move in Move)
        slots = self._host.tokens // self._page_tokens
        return TransferReport([transfer.id for transfer in ended], [], slots, seconds)

    def _page_s(self, move: Move) -> float:
        if self._host is None or move not in (Move.STORE, Move.LOAD):
            return 0.0
        token_s = self._host.load_token_s if move is Move.LOAD else self._host.store_token_s
        return token_s * self._page_tokens
