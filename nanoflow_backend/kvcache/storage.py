"""The KV page tensors of all layers."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig


def local_kv_heads(config: ModelConfig, tp: int) -> int:
    """KV heads of one rank; fewer heads than ranks are copied."""
    return -(-config.num_kv_heads // tp)


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype, tp: int = 1) -> int:
    """What one page of all layers takes on one rank."""
    elements_a_token = config.num_layers * 2 * local_kv_heads(config, tp) * config.head_dim
    return elements_a_token * page_tokens * dtype.itemsize


def allocate(
    config: ModelConfig,
    num_pages: int,
    page_tokens: int,
    dtype: torch.dtype,
    tp: int = 1,
    *,
    device: torch.device | str = "cpu",
    poison: bool = False,
) -> Tensor:
    """One rank's pages, [layers, pages, 2 (K, V), kv heads, page_tokens, head_dim]: a (page, head) is one tile.

    Poisoned pages are NaN, so that reading what was never written shows.
    """
    shape = (config.num_layers, num_pages, 2, local_kv_heads(config, tp), page_tokens, config.head_dim)
    return torch.full(shape, torch.nan if poison else 0, dtype=dtype, device=device)
