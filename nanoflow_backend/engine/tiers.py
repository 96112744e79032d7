"""make_transfers and make_lower_tiers build the tiers below the device from the configuration: their pages, their rules."""

from __future__ import annotations

import torch

from nanoflow_backend.engine.settle import Settled
from nanoflow_backend.engine.tier_transfers import TierTransfers
from nanoflow_backend.kvcache.host_pool import HostPool
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.kv_pages import KvPages, page_bytes
from nanoflow_backend.kvcache.tier import PageStore
from nanoflow_backend.runtime.page_copies import CpuPageCopies, CudaPageCopies
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.tiers.rates import Rates

LOADING_BYTES = 2**30  # of a rank that may be on their way to the device at once: 20 ms of an H200's link


def make_transfers(settled: Settled, kv: KvPages, host_slots: int, rank: int) -> TierTransfers | None:
    """One rank's. None: there are no tiers below the device."""
    if not host_slots:
        return None
    pool = HostPool(kv, host_slots)
    return TierTransfers(CudaPageCopies(kv, pool) if kv.tensor.is_cuda else CpuPageCopies(kv, pool), pool)


def make_lower_tiers(settled: Settled, store: PageStore | None) -> LowerTiers | None:
    """The scheduler's. `store` is the first rank's. None: there are no tiers below the device."""
    config = settled.config
    if not config.host_kv_cache_bytes:
        return None
    dtype = getattr(torch, config.precision.kv)
    bytes_a_page = page_bytes(settled.model_config, config.page_tokens, dtype, config.tensor_parallel)
    filled = -(-config.dense_batch_tokens // config.page_tokens) + config.max_running  # pages that a step can fill
    step_bytes = config.host_kv_cache_step_bytes
    limits = TierLimits(
        store_pages=max(1, 2 * filled if step_bytes is None else step_bytes // (bytes_a_page * config.tensor_parallel)),
        load_pages=max(1, LOADING_BYTES // bytes_a_page),
        keep=config.host_kv_cache_keep,
    )
    return LowerTiers(HostTier(), limits, Rates(config.page_tokens), store)
