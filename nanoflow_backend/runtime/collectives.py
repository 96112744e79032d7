"""Collectives: the network kernels, over torch.distributed; with one rank they are copies.

T tokens, D columns of the whole row, n ranks. Every rank must issue the same calls in the same order.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Collectives:
    """Kernels over the ranks of `group`; None: over this rank alone."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.ranks = group.size() if group is not None else 1

    def all_reduce(self, x: Tensor, *, out: Tensor) -> None:
        """The ranks' sum: [T, D] -> [T, D]."""
        if self.ranks == 1:
            out.copy_(x)
            return
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        out.copy_(total)

    def reduce_scatter(self, x: Tensor, *, out: Tensor) -> None:
        """This rank's columns of the ranks' sum: [T, D] -> [T, D / n]."""
        if self.ranks == 1:
            out.copy_(x)
            return
        part = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        dist.reduce_scatter(part, [columns.contiguous() for columns in x.chunk(self.ranks, 1)], group=self.group)
        out.copy_(part)

    def all_gather(self, x: Tensor, *, out: Tensor) -> None:
        """The ranks' columns side by side: [T, D / n] -> [T, D]."""
        if self.ranks == 1:
            out.copy_(x)
            return
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(self.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        torch.cat(parts, 1, out=out)
