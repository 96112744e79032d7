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
    attention_factor: float = 1.0,
    out: tuple[Tensor, Tensor],
) -> None:
    """Rotate queries and keys by position, and append K and V to their pages in place.

    The halves (a, b) of a head's first r dimensions turn by the angles w = position * frequencies, in fp32:
    (a cos w - b sin w, b cos w + a sin w) times attention_factor, as in Hugging Face's layout of the weights. The other
    d - r stay as they are. With `kv_scales`, pages of e4m3 get K / kv_scales[0] and V / kv_scales[1], limited to what
    e4m3 holds.

    qkv [T, (H + 2K) d], positions [T], slots [T], page_table [S, N], frequencies [r / 2] with r <= d, kv_scales [2]
    fp32 -> q [T, H d], pages.
    """
    q, pages = out
    kv_heads, page_tokens, head_dim = pages.shape[2:]
    positions, slots = positions.long(), slots.long()
    split = qkv.unflatten(1, (-1, head_dim))
    angles = positions[:, None, None].float() * frequencies.float()
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    half = len(frequencies)
    a, b, rest = split[:, :-kv_heads].float().split((half, half, head_dim - 2 * half), -1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    q.copy_(rotated[:, :-kv_heads].flatten(1))
    page, place = page_table[slots, positions // page_tokens].long(), positions % page_tokens
    for which, fresh in enumerate((rotated[:, -kv_heads:], split[:, -kv_heads:])):
        if kv_scales is not None:
            fresh = (fresh.float() / kv_scales[which]).clamp(-E4M3_MAX, E4M3_MAX)
        pages[page, which, :, place] = fresh.to(pages.dtype)


def norm_rope_append(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    frequencies: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    kv_scales: Tensor | None = None,
    *,
    eps: float,
    attention_factor: float = 1.0,
    out: tuple[Tensor, Tensor],
) -> None:
    """Compute rope_append with every head x of Q and of K replaced by x / sqrt(mean(x^2) + eps) * its norm's weight.

    Operands are those of rope_append, and q_norm [d], k_norm [d].
    """
    kv_heads, _, head_dim = out[1].shape[2:]
    heads = qkv.float().unflatten(1, (-1, head_dim))
    q, k, v = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), 1)
    q, k = (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()
        for x, weight in ((q, q_norm), (k, k_norm))
    )
    rope_append(
        torch.cat((q, k, v), 1).flatten(1), positions, slots, page_table, frequencies, kv_scales,
        attention_factor=attention_factor, out=out,
    )  # fmt: skip
