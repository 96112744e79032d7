"""A mixture of experts: the router's choice, and the products of each token's experts."""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_kernels.reference.products import gated


def route(logits: Tensor, *, out: tuple[Tensor, Tensor]) -> None:
    """Choose the k experts with the largest softmax over all of them, best first (the lower id where equal), and their
    weights, which sum to 1.

    logits [T, E] -> experts [T, k] int32, weights [T, k] fp32.
    """
    experts, weights = out
    best, order = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    chosen = best[:, : weights.shape[1]]
    experts.copy_(order[:, : experts.shape[1]])
    weights.copy_(chosen / chosen.sum(-1, keepdim=True))


def grouped_linear_swiglu(x: Tensor, experts: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Compute linear_swiglu of each token with the matrices of its chosen experts, side by side in its row.

    x [T, in], experts [T, k], weight [E, 2 F, in] -> [T, k F].
    """
    side_by_side = out.unflatten(1, (experts.shape[1], -1))
    for expert in experts.unique().tolist():
        token, choice = torch.where(experts == expert)
        side_by_side[token, choice] = gated(x[token] @ weight[expert].T).to(out.dtype)


def grouped_combine(x: Tensor, experts: Tensor, weights: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Compute the sum over a token's choices of its weight times (that part of the row times the expert's matrix).

    x [T, k in], experts [T, k], weights [T, k], weight [E, out, in] -> [T, out].
    """
    parts = x.unflatten(1, (experts.shape[1], -1)).float()
    total = torch.zeros(out.shape)
    for expert in experts.unique().tolist():
        token, choice = torch.where(experts == expert)
        product = parts[token, choice] @ weight[expert].float().T
        total[token] += product * weights[token, choice, None]
    out.copy_(total)
