"""This module defines what every kernel computes, in plain torch. The CPU program runs it; the GPU's kernels are
compared with it.

A kernel is called as `kernel(*inputs, *parameters, out=outputs, **attributes)`, in the order of the graph's Operation.
Inputs and outputs are rows of a nano-batch; outputs never overlap inputs. Math is fp32 and rounded once, to the
output's dtype. Operands are not checked: the graph has made them.

Shape legend: T tokens (rows), D hidden, H query heads, K kv heads, d head_dim, V vocabulary, E experts, k chosen
experts a token, S slots, N pages of a slot, P tokens a page. `pages` is one layer's KV: [pages, 2 (K, V), K, P, d].
Activations are [T, ...] of one dtype (fp32, fp16 or bf16); ids, positions, slots and the page table are int32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys of so many tokens are copied at a time: they stay in the cache. 64 decodes at 1,000 tokens (8 kv heads of 64,
# one core) take 360 ms all at once, 210 ms with 1024 to 4096.
GATHERED_TOKENS = 2048


def embed(token_ids: Tensor, table: Tensor, *, out: tuple[Tensor, Tensor]) -> None:
    """Compute (0, table[token_ids]): the residual stream starts at zero, and the embedding is its first update.

    token_ids [T], table [V, D] -> residual [T, D], update [T, D].
    """
    residual, update = out
    residual.zero_()
    update.copy_(table[token_ids])


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, *, eps: float, out: tuple[Tensor, Tensor]) -> None:
    """Compute (s, s / sqrt(mean(s^2) + eps) * weight) with s = residual + update, rounded as it is kept.

    residual [T, D], update [T, D], weight [D] -> [T, D], [T, D].
    """
    kept, normed = out
    kept.copy_(residual.float() + update.float())
    s = kept.float()
    normed.copy_(s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) * weight.float())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> None:
    """Compute x weight^T + bias; a wider `out` gets the unrounded sums.

    x [T, in], weight [out, in], bias [out] -> [T, out], of x's dtype or fp32.
    """
    if out.dtype != x.dtype:
        x, weight, bias = x.to(out.dtype), weight.to(out.dtype), None if bias is None else bias.to(out.dtype)
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    *,
    out: tuple[Tensor, Tensor],
) -> None:
    """Rotate queries and keys by position, and append K and V to their pages in place.

    A head's halves (a, b) turn by the angles w = position * frequencies, in fp32: (a cos w - b sin w, b cos w +
    a sin w), as in Hugging Face's layout of the weights.

    qkv [T, (H + 2K) d], positions [T], slots [T], page_table [S, N], frequencies [d / 2] -> q [T, H d], pages.
    """
    q, pages = out
    kv_heads, page_tokens, head_dim = pages.shape[2:]
    positions, slots = positions.long(), slots.long()
    split = qkv.unflatten(1, (-1, head_dim))
    angles = positions[:, None, None].float() * frequencies.float()
    cos, sin = angles.cos(), angles.sin()
    a, b = split[:, :-kv_heads].float().chunk(2, -1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    q.copy_(rotated[:, :-kv_heads].flatten(1))
    page, place = page_table[slots, positions // page_tokens].long(), positions % page_tokens
    pages[page, 0, :, place] = rotated[:, -kv_heads:].to(pages.dtype)
    pages[page, 1, :, place] = split[:, -kv_heads:].to(pages.dtype)


def attention(q: Tensor, pages: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor, *, out: Tensor) -> None:
    """Compute softmax(q k^T / sqrt(d)) v of each token over its request's keys at positions 0 .. its own.

    Rows of one slot are consecutive and ascending. Nothing beyond a request's last row enters the result: it may be
    NaN.

    q [T, H d], pages, positions [T], slots [T], page_table [S, N] -> [T, H d].
    """
    head_dim, page_tokens = pages.shape[-1], pages.shape[-2]
    positions, slots = positions.long(), slots.long()
    _, counts = torch.unique_consecutive(slots, return_counts=True)
    stops = counts.cumsum(0)
    lengths = positions[stops - 1] + 1
    for count, requests in _alike(counts.tolist(), lengths.tolist(), page_tokens):
        rows = (stops[requests] - count)[:, None] + torch.arange(count)  # [requests, count]
        k, v = _gather(pages, page_table[slots[rows[:, 0]]].long(), lengths[requests])
        visible = torch.arange(k.shape[2]) <= positions[rows][:, None, :, None]
        # The query heads of one kv head are more rows for the same keys: [requests, K, H / K * count, d].
        grouped = q[rows].unflatten(-1, (k.shape[1], -1, head_dim)).permute(0, 2, 3, 1, 4).float()
        visible = visible.repeat(1, 1, grouped.shape[2], 1)
        attended = F.scaled_dot_product_attention(grouped.flatten(2, 3), k, v, attn_mask=visible)
        attended = attended.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4)
        out[rows.flatten()] = attended.flatten(2).flatten(0, 1).to(out.dtype)


def _alike(counts: list[int], lengths: list[int], page_tokens: int) -> Iterator[tuple[int, Tensor]]:
    """(rows of each, requests) with equally many rows and up to twice the pages of each other, some at a time."""
    alike = defaultdict(list)
    for request, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        alike[count, (-(-length // page_tokens) - 1).bit_length()].append(request)
    for (count, doublings), requests in alike.items():
        for part in torch.tensor(requests).split(max(1, GATHERED_TOKENS // (page_tokens << doublings))):
            yield count, part


def _gather(pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Keys and values of requests, [2, requests, K, longest, d] and fp32, zero beyond a request's length."""
    longest, page_tokens = int(lengths.max()), pages.shape[-2]
    table = table[:, : -(-longest // page_tokens)]
    beyond = torch.arange(table.shape[1]) * page_tokens >= lengths[:, None]
    table = torch.where(beyond, table[:, :1], table)  # those entries are not set: read any page that exists
    gathered = pages.index_select(0, table.flatten()).unflatten(0, table.shape)  # faster than pages[table]
    kv: Tensor = gathered.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)[..., :longest, :].float()
    kv.masked_fill_((torch.arange(longest) >= lengths[:, None])[:, None, :, None], 0)
    return kv


def linear_swiglu(x: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """Compute silu(x gate^T) * (x up^T), where row 2 i of the weight is gate i and row 2 i + 1 is up i.

    x [T, in], weight [2 F, in] -> [T, F].
    """
    out.copy_(_gated(x @ weight.T))


def _gated(pairs: Tensor) -> Tensor:
    """silu(gate) * up [T, F] of columns that alternate [T, 2 F]."""
    gate, up = pairs.float().unflatten(1, (-1, 2)).unbind(2)
    product: Tensor = F.silu(gate) * up
    return product


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
        side_by_side[token, choice] = _gated(x[token] @ weight[expert].T).to(out.dtype)


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
