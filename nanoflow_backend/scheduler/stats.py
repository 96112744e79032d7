"""SchedulerStats: what the metrics of a server are made of."""

from __future__ import annotations

import msgspec


class SchedulerStats(msgspec.Struct, frozen=True):
    """Requests and pages as they are now; the rest counts from the start."""

    waiting_requests: int
    queue_room: int  # requests that may still come
    received_requests: int  # to which `queue_room` refers, those refused too
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
