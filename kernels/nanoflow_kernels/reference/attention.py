"""Attention over pages, gathered some requests at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Keys of so many tokens are copied at a time: they stay in the cache. 64 decodes at 1,000 tokens (8 kv heads of 64,
# one core) take 360 ms all at once, 210 ms with 1024 to 4096.
GATHERED_TOKENS = 2048


def attention(
    q: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    kv_scales: Tensor | None = None,
    *,
    window: int = 0,
    out: Tensor,
) -> None:
    """Compute softmax(q k^T / sqrt(d)) v of each token over its request's keys at positions 0 .. its own; with a
    `window`, over the last so many of these.

    Rows of one slot are consecutive and ascending. Nothing beyond a request's last row enters the result: it may be
    NaN. Pages of e4m3 stand for K times kv_scales[0] and V times kv_scales[1].

    q [T, H d], pages, positions [T], slots [T], page_table [S, N], kv_scales [2] fp32 -> [T, H d].
    """
    head_dim, page_tokens = pages.shape[-1], pages.shape[-2]
    positions, slots = positions.long(), slots.long()
    _, counts = torch.unique_consecutive(slots, return_counts=True)
    stops = counts.cumsum(0)
    lengths = positions[stops - 1] + 1
    for count, requests in _alike(counts.tolist(), lengths.tolist(), page_tokens):
        rows = (stops[requests] - count)[:, None] + torch.arange(count)  # [requests, count]
        k, v = _gather(pages, page_table[slots[rows[:, 0]]].long(), lengths[requests])
        if kv_scales is not None:
            k, v = k * kv_scales[0], v * kv_scales[1]
        before = positions[rows][:, None, :, None] - torch.arange(k.shape[2])  # of the row, a key is so far
        visible = (before >= 0) & (before < window) if window else before >= 0
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
