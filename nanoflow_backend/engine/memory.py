"""check_room compares weights and KV cache with the memory that is free, before anything is allocated."""

from __future__ import annotations

import torch

from nanoflow_backend.config.engine_config import SettledConfig
from nanoflow_backend.config.error import ConfigError
from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.kvcache import kv_pages

GIB = 2**30


def check_room(config: SettledConfig, model: ModelConfig, weights_bytes: int, free_bytes: int, where: str) -> None:
    """Compare what one rank will allocate with its part of the memory of `where`.

    Raises:
        ConfigError: with the numbers, and the setting to change.
    """
    free = f"{free_bytes / GIB:.2f} GiB of memory are free on {where}"
    if weights_bytes > free_bytes:
        ranks = config.tensor_parallel
        raise ConfigError(
            f"model: its weights take {weights_bytes / GIB:.2f} GiB in {config.dtype} on each of {ranks} ranks, but "
            f"{free}: free some, choose a narrower dtype, more ranks (tensor_parallel) or a smaller model"
        )
    row_bytes = model.hidden_size * getattr(torch, config.precision.activations).itemsize
    hidden_bytes = row_bytes * config.dense_batch_tokens  # of the several values of a step
    if hidden_bytes > free_bytes - weights_bytes:
        raise ConfigError(
            f"dense_batch_tokens: the hidden states of {config.dense_batch_tokens} tokens alone take "
            f"{hidden_bytes / GIB:.2f} GiB beside weights of {weights_bytes / GIB:.2f} GiB, but {free}: "
            f"expected less than {(free_bytes - weights_bytes) // row_bytes}"
        )
    kv_dtype = getattr(torch, config.precision.kv)
    page_bytes = kv_pages.page_bytes(model, config.page_tokens, kv_dtype, config.tensor_parallel)
    room_tokens = (free_bytes - weights_bytes) // page_bytes * config.page_tokens
    if config.kv_cache_tokens and config.kv_cache_tokens > room_tokens:
        kv_bytes = page_bytes * -(-config.kv_cache_tokens // config.page_tokens)
        raise ConfigError(
            f"kv_cache_tokens: {config.kv_cache_tokens} tokens take {kv_bytes / GIB:.2f} GiB beside weights of "
            f"{weights_bytes / GIB:.2f} GiB, but {free}: expected at most {room_tokens}"
        )


def check_host_room(config: SettledConfig, slot_bytes: int, free_bytes: int) -> int:
    """The slots of host memory that each rank has for pages of the KV cache: those of `host_kv_cache_bytes`.

    Args:
        slot_bytes: what one page takes on one rank.
        free_bytes: of this host, which has an equal part of them, beside all else that the engine takes.

    Raises:
        ConfigError: it holds no page, or is more than is free.
    """
    asked, ranks, hosts = config.host_kv_cache_bytes, config.tensor_parallel, config.hosts
    if not asked:
        return 0
    if asked > free_bytes * hosts:
        each = f" on each of {hosts} hosts" if hosts > 1 else ""
        raise ConfigError(
            f"host_kv_cache_bytes: {asked / hosts / GIB:.2f} GiB{each}, but {free_bytes / GIB:.2f} GiB of the host's "
            f"memory are free: expected at most {max(0, free_bytes) * hosts}"
        )
    if asked < slot_bytes * ranks:
        raise ConfigError(
            f"host_kv_cache_bytes: expected 0, or at least the {slot_bytes * ranks} bytes of a page of "
            f"{config.page_tokens} tokens on {ranks} ranks, got {asked}"
        )
    return asked // (slot_bytes * ranks)
