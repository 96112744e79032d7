"""The tiers below the device are made from the configuration: those who move pages, and those who decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nanoflow_backend.config.settled import Settled
from nanoflow_backend.engine.executor import Executor
from nanoflow_backend.engine.tiers.transfers import TierTransfers
from nanoflow_backend.kvcache.disk.disk_store import DiskStore
from nanoflow_backend.kvcache.disk.page_file import PageLayout
from nanoflow_backend.kvcache.disk.page_folder import PageFolder
from nanoflow_backend.kvcache.disk.store_threads import StoreThreads
from nanoflow_backend.kvcache.host_pool import HostPool
from nanoflow_backend.kvcache.host_tier import HostTier
from nanoflow_backend.kvcache.kv_pages import KvPages, page_bytes
from nanoflow_backend.kvcache.page_events import PageEvents
from nanoflow_backend.models.fingerprint import weights_fingerprint
from nanoflow_backend.runtime.page_copies import CpuPageCopies, CudaPageCopies
from nanoflow_backend.scheduler.tiers.limits import TierLimits
from nanoflow_backend.scheduler.tiers.lower_tiers import LowerTiers
from nanoflow_backend.scheduler.tiers.rates import Rates

LOADING_BYTES = 2**30  # of a rank that may be on their way to the device at once: 20 ms of an H200's link


def make_transfers(settled: Settled, kv: KvPages, host_slots: int, rank: int) -> TierTransfers | None:
    """One rank's. None: there are no tiers below the device.

    Raises:
        ConfigError: there can be no files in the folder of the disk tier, or its bound is below one page.
    """
    if not host_slots:
        return None
    config = settled.config
    store = None
    if config.disk_kv_cache:
        layout = page_layout(settled, kv, rank)
        store = DiskStore(PageFolder(Path(config.disk_kv_cache.path), config.disk_kv_cache.bytes, layout), layout)
    pool = HostPool(kv, host_slots)
    copies = CudaPageCopies(kv, pool) if kv.tensor.is_cuda else CpuPageCopies(kv, pool)
    return TierTransfers(copies, pool, StoreThreads(store) if store else None, store)


def page_layout(settled: Settled, kv: KvPages, rank: int) -> PageLayout:
    """What makes pages on a disk those of this model, in this form, on this rank."""
    config = settled.config
    layers, _, *page = kv.tensor.shape
    return PageLayout(
        weights=weights_fingerprint(Path(config.model), config.load_format, config.quantization),
        precision=str(config.precision),
        layout=f"{layers} layers x (K, V), heads, tokens, d: {' x '.join(map(str, page))}",
        page_tokens=kv.page_tokens,
        rank=rank,
        world=config.tensor_parallel,
        payload_bytes=kv.page_bytes,
    )


def make_lower_tiers(settled: Settled, executor: Executor[Any], events: PageEvents | None) -> LowerTiers:
    """The scheduler's, where there is host memory below the device. `events` are told what host memory has."""
    config = settled.config
    dtype = getattr(torch, config.precision.kv)
    bytes_a_page = page_bytes(settled.model_config, config.page_tokens, dtype, config.tensor_parallel)
    filled = -(-config.dense_batch_tokens // config.page_tokens) + config.max_running  # pages that a step can fill
    step_bytes = config.host_kv_cache_step_bytes
    limits = TierLimits(
        page_bytes=bytes_a_page * config.tensor_parallel,
        store_pages=max(1, 2 * filled if step_bytes is None else step_bytes // (bytes_a_page * config.tensor_parallel)),
        load_pages=max(1, LOADING_BYTES // bytes_a_page),
        keep=config.host_kv_cache_keep,
    )
    host = HostTier(events)
    if (report := executor.report_transfers()) is not None:
        host.grow(report.slots)
    return LowerTiers(host, limits, Rates(config.page_tokens), executor.page_index)
