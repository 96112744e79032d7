"""Sampling on the device, without a word from the host: logits to token ids, as reference_sampling says."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_kernels.reference_sampling import _restrict, logprobs, uniform

__all__ = ["logprobs", "sample"]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """See reference_sampling.sample."""
    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature.clamp(min=1e-6)[:, None]
    cumulative = _restrict(scores.softmax(-1), top_k, top_p).cumsum(-1)
    u = uniform(seed, position)[:, None]
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0]
    return torch.where(temperature > 0, drawn, logits.argmax(-1))
