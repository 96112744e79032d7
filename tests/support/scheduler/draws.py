"""What a random history of the scheduler draws: its limits, the tiers below the device, and each request."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from support.scheduler.ledger_executor import VOCABULARY
from support.scheduler.lossy_disk import LossyDisk

from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.page_events import PageEvents
from nanoflow_backend.request.request import Request
from nanoflow_backend.request.sampling_params import SamplingParams
from nanoflow_backend.scheduler.limits import SchedulerLimits
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.tiers.rates import Rates

MOST_SEQUENCES = 3  # of a request; each has a seed of its own


class Tiers(NamedTuple):
    """Host memory and perhaps a disk below the device; by default there is nothing."""

    lower: LowerTiers | None = None
    host_slots: int = 0
    disk: LossyDisk | None = None


def limits(rng: random.Random) -> SchedulerLimits:
    page_tokens = rng.choice((1, 2, 3, 4))
    num_pages = rng.randint(2, 12)
    max_model_tokens = rng.choice((rng.randint(2, 20), 60))
    max_running = rng.randint(1, 6)
    max_queue_size = rng.randint(1, 8)
    dense_batch_tokens = max_running + rng.choice((0, 1, 3, 12))
    return SchedulerLimits(
        dense_batch_tokens=dense_batch_tokens,
        chunk_tokens=rng.randint(1, dense_batch_tokens),
        prompt_tokens=rng.choice((dense_batch_tokens, rng.randint(1, dense_batch_tokens))),
        max_running=max_running,
        max_queue_size=max_queue_size,
        num_pages=num_pages,
        page_tokens=page_tokens,
        max_model_tokens=max_model_tokens,
    )


def tiers(rng: random.Random, page_tokens: int, events: PageEvents, clock: Callable[[], float]) -> Tiers:
    """`events` gets what host memory takes and gives away."""
    host_slots = rng.choice((2, 3, 4, 6, 60))
    disk = rng.choice((None, *[LossyDisk(rng.choice((0, 5, 100, 100)), rng)] * 3))
    limits = TierLimits(
        store_pages=rng.choice((1, 2, 8)),
        load_pages=rng.choice((1, 2, 8)),
        disk_moves=rng.choice((1, 4)),
        keep=rng.choice(("all", "all", "seen_twice")),
        most_seen=rng.choice((4, 100)),
    )
    lower = LowerTiers(HostTier(events), limits, Rates(page_tokens), disk, clock)
    if rng.random() < 0.5:  # else they are measured: a step takes a second, and a transfer milliseconds
        lower.rates.load.measured(1, rng.choice((0.1, 1.0, 10.0, 1000.0)) * 1e9)
        lower.rates.prefill.measured(1, 1e9)
    return Tiers(lower, host_slots, disk)


def request(rng: random.Random, request_id: int, known: Sequence[list[int]], now_s: float) -> Request:
    """`known`: the tokens of each sequence before it, with which its prompt may begin."""
    prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 8))]
    if known and rng.random() < 0.6:  # a common beginning, or the next round of a conversation
        earlier = rng.choice(known)
        prompt = earlier[: rng.randint(1, len(earlier))] + prompt[: rng.randint(0, 4)]
    max_tokens = rng.randint(1, 20)
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens) if rng.random() < 0.3 else 0,
        seed=MOST_SEQUENCES * request_id,
        n=rng.choice((1, 1, 1, 2, MOST_SEQUENCES)),
        prompt_logprobs=rng.choice((None, None, None, 0)),
        stop_token_ids=(1,) if rng.random() < 0.3 else (),
        ignore_eos=rng.random() < 0.3,
    )
    deadline, queue_deadline = (now_s + rng.randint(0, 20) if rng.random() < 0.15 else None for _ in range(2))
    return Request(request_id, prompt, params, rng.choice((0, 0, 0, 1, -1)), deadline, queue_deadline)
