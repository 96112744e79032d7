"""Collectives is the protocol of the network kernels of a program: what every implementation provides.

T tokens, D columns of the whole row, n ranks, t rows of one rank. Operands are matrices whose rows are contiguous; a
row may be part of a wider one. Outputs never overlap inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol

import torch
from nanoflow_kernels import reference
from torch import Tensor


class Collectives(Protocol):
    """The kernels of one rank. Every rank must issue the same calls, on as many tokens, in the same order.

    A call returns when its inputs may be overwritten and its output may be read by what is issued after it on the same
    stream. `num_sms` is how many SMs a call may fill, as for every kernel; None: all. It changes nothing where the
    exchange does not run on SMs.

    Rows are shared out as `rank_rows` says; columns evenly, so that D has to be a multiple of n. An implementation
    inherits from this class, and may replace what is composed here by a kernel that does it at once.
    """

    @property
    @abstractmethod
    def ranks(self) -> int:
        """Ranks of the group."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This one, from 0."""

    @property
    @abstractmethod
    def capturable(self) -> bool:
        """Whether calls may be captured in a CUDA graph: none waits for the host."""

    @abstractmethod
    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """The ranks' sum: x [T, D] -> [T, D], of one dtype."""

    @abstractmethod
    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """This rank's columns of the ranks' sum: x [T, D] -> [T, D / n], of one dtype."""

    @abstractmethod
    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """The ranks' columns side by side: x [T, D / n] -> [T, D], of one dtype."""

    @abstractmethod
    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """This rank's rows of the ranks' sum: x [T, D] -> [t, D], of one dtype."""

    @abstractmethod
    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """The ranks' rows one below the other: x [t, D] -> [T, D], of one dtype."""

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
        """Reduce-scatter the updates over rows, `add_rms_norm` on this rank's rows, all-gather the normed rows.

        Each rank keeps its rows of the residual stream alone, and norms those alone: 1 / n of the work and of the bytes
        that an all-reduce with the norm behind it takes.

        residual [t, D], update [T, D], weight [D] -> kept [t, D], normed [T, D], of one dtype; kept = residual + this
        rank's rows of the ranks' sum of updates, normed = the ranks' rows of kept / rms(kept) * weight.
        Source: Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022 (sequence
        parallelism); here composed of three calls.
        """
        kept, normed = out
        summed, mine = torch.empty_like(kept), torch.empty_like(kept)
        self.reduce_scatter_rows(update, out=summed, num_sms=num_sms)
        reference.add_rms_norm(residual, summed, weight, eps=eps, out=(kept, mine))
        self.all_gather_rows(mine, out=normed, num_sms=num_sms)

    def abort(self) -> None:
        """A rank has ended: let calls that wait for it end, with whatever outputs. Thread-safe; returns at once."""
        return

    def close(self) -> None:
        """Give back what the calls took, when all have ended and no graph holds any. Harmless when repeated."""
        return


def rank_rows(tokens: int, rank: int, ranks: int) -> range:
    """The rows that a rank has of `tokens`: ceil(tokens / ranks) each, the last ranks fewer or none."""
    size = -(-tokens // ranks)
    return range(min(rank * size, tokens), min((rank + 1) * size, tokens))
