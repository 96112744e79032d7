"""Kernels on rows: the embedding, the residual stream and its norm, rotary positions and the append to the pages."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0  # the largest e4m3


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


def rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    kv_scales: Tensor | None = None,
    *,
    out: tuple[Tensor, Tensor],
) -> None:
    """Rotate queries and keys by position, and append K and V to their pages in place.

    A head's halves (a, b) turn by the angles w = position * frequencies, in fp32: (a cos w - b sin w, b cos w +
    a sin w), as in Hugging Face's layout of the weights. With `kv_scales`, pages of e4m3 get K / kv_scales[0] and
    V / kv_scales[1], limited to what e4m3 holds.

    qkv [T, (H + 2K) d], positions [T], slots [T], page_table [S, N], frequencies [d / 2], kv_scales [2] fp32 ->
    q [T, H d], pages.
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
    for which, fresh in enumerate((rotated[:, -kv_heads:], split[:, -kv_heads:])):
        if kv_scales is not None:
            fresh = (fresh.float() / kv_scales[which]).clamp(-E4M3_MAX, E4M3_MAX)
        pages[page, which, :, place] = fresh.to(pages.dtype)
