"""KvPages are the tensors in which one rank keeps the keys and values of all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig


@dataclass(frozen=True, eq=False)
class KvPages:
    """The pages of all layers on one device.

    tensor: [layers, pages, 2 (K, V), kv heads, page_tokens, head_dim], contiguous, of any floating dtype: K or V of one
    head in one page of one layer is one contiguous tile [page_tokens, head_dim]. A page of all layers, what one request
    holds and what moves between tiers, is tensor[:, page]. Scales of e4m3 pages are a layer's, and so parameters.

    A tensor of fewer layers than the model has is shared: layer i is that of i modulo them, and what it holds is of no
    meaning. Only what measures time does that.
    """

    tensor: Tensor

    def __post_init__(self) -> None:
        """Raises: ValueError, naming what is not in the layout."""
        if self.tensor.ndim != 6 or self.tensor.shape[2] != 2:
            raise ValueError(f"pages: expected [layers, pages, 2, heads, tokens, d], got {tuple(self.tensor.shape)}")

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_pages: int,
        page_tokens: int,
        dtype: torch.dtype,
        tp: int = 1,
        *,
        device: torch.device | str = "cpu",
        poison: bool = False,
    ) -> KvPages:
        """One rank's pages, zero; poisoned ones are NaN, so that reading what was never written shows."""
        shape = (config.num_layers, num_pages, 2, local_kv_heads(config, tp), page_tokens, config.head_dim)
        return cls(torch.full(shape, torch.nan if poison else 0, dtype=dtype, device=device))

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored keys and values."""
        return self.tensor.dtype

    @property
    def num_pages(self) -> int:
        """Pages of a layer; every layer has as many."""
        return self.tensor.shape[1]

    @property
    def page_tokens(self) -> int:
        """Tokens whose keys and values one page holds."""
        return self.tensor.shape[4]

    @property
    def page_bytes(self) -> int:
        """What one page of all layers takes."""
        return self.tensor[:, :1].numel() * self.tensor.element_size()

    def layer(self, index: int) -> Tensor:
        """The pages of one layer as kernels take them: [pages, 2, kv heads, page_tokens, head_dim]."""
        return self.tensor[index % len(self.tensor)]


def local_kv_heads(config: ModelConfig, tp: int) -> int:
    """KV heads of one rank; fewer heads than ranks are copied."""
    return -(-config.num_kv_heads // tp)


def page_bytes(config: ModelConfig, page_tokens: int, dtype: torch.dtype, tp: int = 1) -> int:
    """What one page of all layers will take on one rank, known before it is allocated."""
    elements_a_token = config.num_layers * 2 * local_kv_heads(config, tp) * config.head_dim
    return elements_a_token * page_tokens * dtype.itemsize
