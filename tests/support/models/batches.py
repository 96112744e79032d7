"""Requests at known token ids, and the batches that a scheduler would make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanoflow_backend.config.model_config import ModelConfig
from nanoflow_backend.kvcache.kv_pages import KvPages
from nanoflow_backend.runtime.program import Program

Chunk = tuple[int, int, int]  # slot, start, stop: consecutive tokens of one request


class Inputs(NamedTuple):
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor


def forward(program: Program, inputs: Sequence[Tensor], decode_kv_tokens: int = 0, **options: Any) -> None:
    """Run `inputs` under the plan for a batch of so many tokens, whose decodes read so much."""
    plan = program.plan_for(len(inputs[0]), decode_kv_tokens)
    program.forward(plan, *inputs, **options)


def decode_kv_tokens(batch: list[Chunk]) -> int:
    """That single tokens behind others read."""
    return sum(stop for _, start, stop in batch if start == stop - 1 > 0)


class Requests:
    """`len(lengths)` requests of random tokens, each in its slot, with pages in no order."""

    def __init__(self, config: ModelConfig, lengths: list[int], page_tokens: int = 4, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        self.config, self.page_tokens = config, page_tokens
        self.ids = [torch.randint(config.vocab_size, (n,), generator=rng) for n in lengths]
        pages = -(-max(lengths) // page_tokens)
        self.num_pages = pages * len(lengths)
        self.page_table = torch.randperm(self.num_pages, generator=rng).view(len(lengths), pages).int()

    def empty_pages(self, tp: int = 1) -> Tensor:
        return KvPages.allocate(self.config, self.num_pages, self.page_tokens, torch.float32, tp, poison=True)

    def inputs(self, batch: list[Chunk]) -> Inputs:
        return Inputs(
            torch.cat([self.ids[slot][start:stop] for slot, start, stop in batch]).int(),
            torch.cat([torch.arange(start, stop) for _, start, stop in batch]).int(),
            torch.cat([torch.full((stop - start,), slot) for slot, start, stop in batch]).int(),
            self.page_table,
        )

    @staticmethod
    def rows(values: list[Tensor], batch: list[Chunk]) -> Tensor:
        """Those rows of per-request values that a batch computes."""
        return torch.cat([values[slot][start:stop] for slot, start, stop in batch])
