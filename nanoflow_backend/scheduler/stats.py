"""SchedulerStats are the numbers from which a server's metrics are made."""

from __future__ import annotations

import msgspec

from nanoflow_backend.scheduler.tiers.stats import TierStats


class SchedulerStats(msgspec.Struct, frozen=True):
    """Requests and pages as they are now; the rest counts from the start."""

    waiting_requests: int
    running_requests: int  # with a slot
    num_pages: int
    used_pages: int  # held by requests
    cached_pages: int  # held by nobody, and kept for their content until they are needed
    steps: int
    finished_requests: int
    preemptions: int
    overshoot_tokens: int  # sampled for requests that had already ended, and never shown
    prefix_query_tokens: int  # of all prompts that were admitted
    prefix_hit_tokens: int  # of these, those not computed again
    tiers: TierStats | None = None  # of the tiers below the device, if there are any
