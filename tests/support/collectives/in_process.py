"""InProcess: ranks that are threads of one process, and pass each other their tensors. A second implementation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives, rank_rows


class Group:
    """What the ranks share: a place for each one's tensor, and a barrier."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.given: list[Tensor | None] = [None] * ranks
        self.barrier = threading.Barrier(ranks, timeout=20)


class InProcess(Collectives):
    capturable = False

    def __init__(self, group: Group, rank: int) -> None:
        self._group, self._rank = group, rank

    @property
    def ranks(self) -> int:
        return self._group.ranks

    @property
    def rank(self) -> int:
        return self._rank

    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        self._exchange(x, lambda each: out.copy_(torch.stack(each).sum(0)))

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        self._exchange(x, lambda each: out.copy_(torch.stack(each).sum(0).chunk(self.ranks, 1)[self._rank]))

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        self._exchange(x, lambda each: out.copy_(torch.cat(each, 1)))

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        rows = rank_rows(len(x), self._rank, self.ranks)
        self._exchange(x, lambda each: out.copy_(torch.stack(each).sum(0)[rows.start : rows.stop]))

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        self._exchange(x, lambda each: out.copy_(torch.cat(each)))

    def _exchange(self, x: Tensor, take: Callable[[list[Tensor]], object]) -> None:
        self._group.given[self._rank] = x
        self._group.barrier.wait()
        take([tensor for tensor in self._group.given if tensor is not None])
        self._group.barrier.wait()


def run_ranks(ranks: int, work: Callable[[Collectives], None]) -> None:
    """Call `work` on each of the ranks, all at once."""
    group = Group(ranks)
    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(lambda rank: work(InProcess(group, rank)), range(ranks)))
