"""Emulated is the collectives of one rank that runs alone: the others are a clock.

T tokens, D columns of the whole row, n ranks, t rows of one rank.
"""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from nanoflow_backend.config.network_table import Collective, NetworkTable
from nanoflow_backend.runtime.collectives.protocol import Collectives


class Emulated(Collectives):
    """Rank 0 of a group whose other ranks are not there, for measurements on one device: tokens mean nothing.

    Each call reads and writes what this rank's memory would see of it, on as many SMs, and takes the time that the
    table has for its size (see NetworkTable.time; `num_sms` as there). The power of links is not in it, nor the time of
    ranks that are late.

    Numbers stay in the range of the whole model's, since values change the power that a GPU draws. The ranks' updates
    are products of independent weights: the RMS of their sum is sqrt(n) times that of one. So an all-reduce multiplies
    this rank's update by sqrt(n). A reduce-scatter adds up n parts of it as if each were another rank's, which has that
    RMS already where there are n; an all-gather repeats this rank's part. What one rank alone adds, the embedding where
    ranks share the residual's rows, is so taken for a part of all.

    Args:
        kernels: `timed_exchange` and `add_rms_norm` of the device, or of the reference.
    """

    rank = 0
    capturable = True

    def __init__(self, table: NetworkTable, kernels: ModuleType | SimpleNamespace) -> None:
        self.table, self._kernels = table, kernels

    @property
    def ranks(self) -> int:
        """See Collectives."""
        return self.table.header.ranks

    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        self._sum("all_reduce", x, out, num_sms)

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        self._sum("reduce_scatter", x, out, num_sms)

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        self._exchange("all_gather", x, out, out, 1.0, num_sms)

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        self._sum("reduce_scatter", x, out, num_sms)

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        self._exchange("all_gather", x, out, out, 1.0, num_sms)

    def reduce_scatter_add_rms_norm_all_gather(
        self,
        residual: Tensor,
        update: Tensor,
        weight: Tensor,
        *,
        eps: float,
        out: tuple[Tensor, Tensor],
        num_sms: int | None = None,
    ) -> None:
        """See Collectives; the norm by the device's kernel."""
        kept, normed = out
        summed, mine = torch.empty_like(kept), torch.empty_like(kept)
        limit = {} if num_sms is None else {"num_sms": num_sms}
        self.reduce_scatter_rows(update, out=summed, num_sms=num_sms)
        self._kernels.add_rms_norm(residual, summed, weight, eps=eps, out=(kept, mine), **limit)
        self.all_gather_rows(mine, out=normed, num_sms=num_sms)

    def _sum(self, collective: Collective, x: Tensor, out: Tensor, num_sms: int | None) -> None:
        parts = math.prod(-(-had // kept) for had, kept in zip(x.shape, out.shape, strict=True) if kept)
        self._exchange(collective, x, out, x, math.sqrt(self.ranks / parts), num_sms)

    def _exchange(
        self, collective: Collective, x: Tensor, out: Tensor, whole: Tensor, scale: float, num_sms: int | None
    ) -> None:
        taken = self.table.time(collective, whole.numel() * whole.element_size(), num_sms)
        self._kernels.timed_exchange(x, out=out, scale=scale, us=taken.us, num_sms=taken.sms)
