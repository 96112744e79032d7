"""A steady batch is what an engine runs in a steady state: decodes with contexts of all ages, and chunks of prompts.

Shapes: T tokens, S requests, N pages of the longest request.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoflow_search.cost.workload import Mix

SPREAD = 0.5  # contexts of decodes lie evenly within this share of their mean


@dataclass(frozen=True)
class SteadyBatch:
    """The inputs of a batch, int32 tensors on the CPU. Decodes come first; pages lie anywhere in the page store."""

    positions: Tensor  # [T]
    slots: Tensor  # [T]
    page_table: Tensor  # [S, N]
    num_pages: int

    @classmethod
    def of(cls, requests: Sequence[tuple[int, int]], page_tokens: int, seed: int = 0) -> SteadyBatch:
        """Return the batch of `requests`: for each, the tokens that its pages hold already, and those in the batch."""
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
    """Return requests that make up a batch of `mix`, each as (tokens before the batch, tokens in it)."""
    decodes = round(mix.decode_tokens)
    return [
        *decode_requests(decodes, mix.decode_context, seed),
        *prompt_requests(round(mix.tokens) - decodes, mix.prefill_context),
    ]


def decode_requests(count: int, context: float, seed: int = 0) -> list[tuple[int, int]]:
    """Return requests that decode, in random order; contexts, the token included, spread evenly around their mean."""
    contexts = [context * (1 - SPREAD + 2 * SPREAD * (i + 0.5) / count) for i in range(count)]
    random.Random(seed).shuffle(contexts)
    return [(max(round(tokens) - 1, 0), 1) for tokens in contexts]


def prompt_requests(tokens: int, context: float) -> list[tuple[int, int]]:
    """Return whole prompts, whose tokens attend to `context` tokens on average, and a chunk from the middle of one for
    the tokens that are left."""
    whole = max(1, round(2 * context) - 1)
    count, rest = divmod(tokens, whole)
    return [(0, whole)] * count + ([(max(0, round(context - (rest + 1) / 2)), rest)] if rest else [])
