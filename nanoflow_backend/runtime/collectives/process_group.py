"""ProcessGroupCollectives runs collectives over a process group of torch.distributed, whichever its backend is.

T tokens, D columns of the whole row, n ranks, t rows of one rank.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives, rank_rows

# torch 2.13 has other names for them.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class ProcessGroupCollectives(Collectives):
    """Collectives of as many ranks as the default process group has, which must exist already.

    Backends want contiguous tensors of one size on all ranks, so columns are packed, and rows padded, before each call.
    """

    def __init__(self) -> None:
        self._ranks, self._rank = dist.get_world_size(), dist.get_rank()

    @property
    def ranks(self) -> int:
        """See Collectives."""
        return self._ranks

    @property
    def rank(self) -> int:
        """See Collectives."""
        return self._rank

    @abstractmethod
    def _group(self, num_sms: int | None) -> dist.ProcessGroup | None:
        """Where a call that may fill so many SMs goes; None: the default."""

    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        total = _packed(out)
        total.copy_(x)
        dist.all_reduce(total, group=self._group(num_sms))
        _unpack(total, out)

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        mine, parts = _packed(out), x.unflatten(1, (self._ranks, -1)).transpose(0, 1).contiguous()
        _reduce_scatter(mine, parts.flatten(0, 1), group=self._group(num_sms))
        _unpack(mine, out)

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        parts = torch.empty((self._ranks, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(parts.flatten(0, 1), x.contiguous(), group=self._group(num_sms))
        out.unflatten(1, (self._ranks, -1)).copy_(parts.transpose(0, 1))

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        parts = self._padded(len(x), x)
        parts[: len(x)] = x
        mine = torch.empty_like(parts[: len(parts) // self._ranks])
        _reduce_scatter(mine, parts, group=self._group(num_sms))
        out.copy_(mine[: len(rank_rows(len(x), self._rank, self._ranks))])

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        parts = self._padded(len(out), x)
        mine = torch.zeros_like(parts[: len(parts) // self._ranks])
        mine[: len(x)] = x
        _all_gather(parts, mine, group=self._group(num_sms))
        out.copy_(parts[: len(out)])

    def _padded(self, tokens: int, like: Tensor) -> Tensor:
        """Zeros [at least tokens, D], as many rows for each rank."""
        rows = len(rank_rows(tokens, 0, self._ranks)) * self._ranks
        return torch.zeros((rows, like.shape[1]), dtype=like.dtype, device=like.device)


def _packed(out: Tensor) -> Tensor:
    """`out`, if its rows lie one behind the other; else another of its shape, that do."""
    return out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)


def _unpack(packed: Tensor, out: Tensor) -> None:
    if packed is not out:
        out.copy_(packed)
