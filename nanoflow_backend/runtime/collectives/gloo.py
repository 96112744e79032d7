"""Gloo runs collectives over torch.distributed's gloo backend, between processes and through the host's memory.

T tokens, D columns of the whole row, n ranks, t rows of one rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives, rank_rows


class Gloo(Collectives):
    """Collectives of the default process group, which must be of the gloo backend and exist already.

    Gloo wants contiguous tensors of one size on all ranks, so columns are packed, and rows padded, before each call.

    Raises:
        RuntimeError: this process has joined no group of the gloo backend.
    """

    capturable = False

    def __init__(self) -> None:
        backend = dist.get_backend() if dist.is_initialized() else None
        if backend != "gloo":
            raise RuntimeError(f"collectives: expected a process group of the gloo backend, got {backend}")
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()

    @property
    def ranks(self) -> int:
        """See Collectives."""
        return self._ranks

    @property
    def rank(self) -> int:
        """See Collectives."""
        return self._rank

    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        out.copy_(total)

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        mine = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        dist.reduce_scatter(mine, [columns.contiguous() for columns in x.chunk(self._ranks, 1)])
        out.copy_(mine)

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(self._ranks)]
        dist.all_gather(parts, x.contiguous())
        torch.cat(parts, 1, out=out)

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        parts = self._padded(len(x), x)
        parts[: len(x)] = x
        mine = torch.empty_like(parts[: len(parts) // self._ranks])
        dist.reduce_scatter(mine, list(parts.chunk(self._ranks)) if len(parts) else [mine] * self._ranks)
        out.copy_(mine[: len(rank_rows(len(x), self._rank, self._ranks))])

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        parts = self._padded(len(out), x)
        mine = torch.zeros_like(parts[: len(parts) // self._ranks])
        mine[: len(x)] = x
        dist.all_gather(list(parts.chunk(self._ranks)) if len(parts) else [parts] * self._ranks, mine)
        out.copy_(parts[: len(out)])

    def _padded(self, tokens: int, like: Tensor) -> Tensor:
        """Zeros [at least tokens, D], as many rows for each rank."""
        rows = len(rank_rows(tokens, 0, self._ranks)) * self._ranks
        return torch.zeros((rows, like.shape[1]), dtype=like.dtype, device=like.device)
