"""wait_for_host_memory lets a measurement begin when all of the host tier's memory is there."""

from __future__ import annotations

import time

from nanoflow_backend.engine import Engine
from nanoflow_backend.kvcache.host_pool import slot_bytes

POLL_S = 0.1
STALLED_S = 10.0  # a slice of 64 MiB is there in 30 ms, or never


def wait_for_host_memory(engine: Engine) -> None:
    """Until a GPU's host memory is pinned: half a second a GiB. Nothing may be on its way.

    Raises:
        RuntimeError: it does not become more, and is less than was asked for.
    """
    tiers, ranks = engine.scheduler.stats.tiers, engine.config.tensor_parallel
    if tiers is None:
        return
    wanted = engine.config.host_kv_cache_bytes // (slot_bytes(tiers.page_bytes // ranks) * ranks)
    pages, grown_s = -1, time.monotonic()
    while (report := engine.executor.report_transfers()) is not None and report.slots < wanted:
        if report.slots > pages:
            pages, grown_s = report.slots, time.monotonic()
        elif time.monotonic() - grown_s > STALLED_S:
            raise RuntimeError(f"host_kv_cache_bytes: {pages} of {wanted} pages are there, and no more come")
        time.sleep(POLL_S)
