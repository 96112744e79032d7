"""SteadyBatch: the batch of an engine in a steady state: decodes with contexts of all ages, and chunks of prompts.

T tokens, S requests, N pages of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow_search.cost.work import Mix

SPREAD = 0.5  # contexts of decodes lie so far around their mean, evenly


@dataclass(frozen=True)
class SteadyBatch:
    """int32, on the CPU. Decodes come first, as a Batch lists its rows; pages lie anywhere."""

    positions: Tensor  # [T]
    slots: Tensor  # [T]
    page_table: Tensor  # [S, N]
    num_pages: int

    @classmethod
    def of(cls, requests: Sequence[tuple[int, int]], page_tokens: int, seed: int = 0) -> SteadyBatch:
        """`requests`: for each, the tokens that its pages hold already, and those in the batch."""
        used = [-(-(past + new) // page_tokens) for past, new in requests]
        order = torch.randperm(sum(used), generator=torch.Generator().manual_seed(seed)).int()
        new_tokens = torch.tensor([new for _, new in requests])
        return cls(
            positions=torch.cat([torch.arange(past, past + new) for past, new in requests]).int(),
            slots=torch.repeat_interleave(torch.arange(len(requests)), new_tokens).int(),
            page_table=torch.nn.utils.rnn.pad_sequence(list(order.split(used)), batch_first=True),
            num_pages=sum(used),
        )


def requests_of(mix: Mix, seed: int = 0) -> list[tuple[int, int]]:
    """Requests that make up a batch of `mix`, as tokens before and tokens in the batch."""
    decodes = round(mix.decode_tokens)
    return [
        *decode_requests(decodes, mix.decode_context, seed),
        *prompt_requests(round(mix.tokens) - decodes, mix.prefill_context),
    ]


def decode_requests(count: int, context: float, seed: int = 0) -> list[tuple[int, int]]:
    """Contexts (with the token itself) spread evenly around their mean, in any order."""
    contexts = [context * (1 - SPREAD + 2 * SPREAD * (i + 0.5) / count) for i in range(count)]
    random.Random(seed).shuffle(contexts)
    return [(max(round(tokens) - 1, 0), 1) for tokens in contexts]


def prompt_requests(tokens: int, context: float) -> list[tuple[int, int]]:
    """Whole prompts, whose tokens see `context` on average, and the chunk from the middle of one that fills up."""
    whole = max(1, round(2 * context) - 1)
    count, rest = divmod(tokens, whole)
    return [(0, whole)] * count + ([(max(0, round(context - (rest + 1) / 2)), rest)] if rest else [])
