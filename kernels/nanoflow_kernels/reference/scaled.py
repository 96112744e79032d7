"""Products of FP8 (e4m3) operands, which are what linear, linear_swiglu and the experts' products are of others.

Scales of activations: one a token [T, 1], or one for each 128 columns of it [T, K / 128]. Scales of a weight [N, K]:
one a row [N], or one for each block of 128 rows and columns [ceil(N / 128), K / 128].
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_kernels.reference.products import gated
from nanoflow_kernels.reference.quantised import dequantise

BLOCK = 128  # rows and columns of a weight that share a scale


def scaled_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, *, out: Tensor
) -> None:
    """Compute x weight^T + bias of what operands and scales stand for, summed in fp32.

    x [T, K] e4m3, x_scale, weight [N, K] e4m3, weight_scale, bias [N] -> [T, N], of any floating dtype.
    """
    y = dequantise(x, x_scale) @ dequantise_weight(weight, weight_scale).T
    out.copy_(y if bias is None else y + bias.float())


def scaled_linear_swiglu(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, *, out: Tensor) -> None:
    """Compute silu(gate) * up, where gates and ups take turns in the rows of the weight: one by one where it has a
    scale a row, 128 by 128 where it has blocks.

    x [T, K] e4m3, x_scale, weight [2 F, K] e4m3, weight_scale -> [T, F].
    """
    pairs = dequantise(x, x_scale) @ dequantise_weight(weight, weight_scale).T
    out.copy_(gated(pairs, 1 if weight_scale.ndim == 1 else BLOCK))


def dequantise_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """weight [N, K] times its scales, in fp32."""
    if scale.ndim == 1:
        return weight.float() * scale[:, None]
    rows, columns = weight.shape
    return weight.float() * scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def scaled_grouped_linear_swiglu(
    x: Tensor, x_scale: Tensor, experts: Tensor, weight: Tensor, weight_scale: Tensor, *, out: Tensor
) -> None:
    """Compute scaled_linear_swiglu of each token with the matrices of its chosen experts, side by side in its row.

    x [T, K] e4m3, x_scale [T, 1], experts [T, k], weight [E, 2 F, K] e4m3, weight_scale [E, 2 F] -> [T, k F].
    """
    side_by_side = out.unflatten(1, (experts.shape[1], -1))
    values = dequantise(x, x_scale)
    for expert in experts.unique().tolist():
        token, choice = torch.where(experts == expert)
        pairs = values[token] @ dequantise_weight(weight[expert], weight_scale[expert]).T
        side_by_side[token, choice] = gated(pairs).to(out.dtype)


def scaled_grouped_combine(
    x: Tensor,
    x_scale: Tensor,
    experts: Tensor,
    weights: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    out: Tensor,
) -> None:
    """Compute the sum over a token's choices of its weight times (that part of the row times the expert's matrix).

    x [T, k F] e4m3, x_scale [T, k], experts [T, k], weights [T, k], weight [E, D, F] e4m3, weight_scale [E, D] ->
    [T, D].
    """
    parts = dequantise(x, x_scale).unflatten(1, (experts.shape[1], -1))
    total = torch.zeros(out.shape)
    for expert in experts.unique().tolist():
        token, choice = torch.where(experts == expert)
        product = parts[token, choice] @ dequantise_weight(weight[expert], weight_scale[expert]).T
        total[token] += product * weights[token, choice, None]
    out.copy_(total)
