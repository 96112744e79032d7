"""This module computes paged causal attention of decodes and prompt chunks in one batch, on grids of one size.

Shape legend: T tokens, H query heads, K kv heads, d head_dim, S slots, N pages of a slot, P tokens a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_kernels.attention.decode import decode
from nanoflow_kernels.attention.plan import AttentionPlan, plan_attention
from nanoflow_kernels.attention.prefill import prefill
from nanoflow_kernels.checks import check_dtype, check_pages, check_rows, check_shape
from nanoflow_kernels.pdl import uses_pdl


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
    num_sms: int | None = None,
    plan: AttentionPlan | None = None,
) -> None:
    """Compute softmax(q k^T / sqrt(d)) v of each token over its request's keys at positions 0 .. its own; with a
    `window`, over the last so many of these.

    Rows of one slot are consecutive and ascending. Nothing beyond a request's last row enters the result: it may be
    NaN. A row at position -1 is padding and gets zeros. `plan` is what plan_attention returns for these positions and
    slots (and the same window and num_sms), for callers that have several layers; None: it is made here.

    q [T, H d], pages [pages, 2, K, P, d], positions [T], slots [T], page_table [S, N] -> out [T, H d]; ints are int32,
    the others of one floating dtype. Or pages are of e4m3, and stand for K times kv_scales[0] and V times kv_scales[1]:
    kv_scales [2] fp32.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive.
    """
    kv_heads, _, head_dim = pages.shape[2:]
    check_rows("attention", q=q, out=out, page_table=page_table)
    check_dtype("attention", q.dtype, out=out)
    check_pages("attention", pages, q.dtype, kv_scales)
    check_dtype("attention", torch.int32, positions=positions, slots=slots, page_table=page_table)
    check_shape("attention", "out", out, *q.shape)
    if not pages.is_contiguous() or head_dim < 16 or head_dim & (head_dim - 1):
        raise ValueError(
            "attention: pages: expected contiguous, with head_dim a power of two from 16 on, got "
            f"{tuple(pages.shape)} with strides {pages.stride()}"
        )
    heads = q.shape[1] // head_dim
    if q.shape[1] % head_dim or heads % kv_heads:
        raise ValueError(
            f"attention: q: expected a multiple of {kv_heads} heads of {head_dim} columns, got {q.shape[1]} columns"
        )
    if len(q) == 0:
        return
    # A plan made here has just been launched, but with PDL a kernel reads its plan before it waits.
    pdl = plan is not None and uses_pdl(len(q), q.device)
    if plan is None:
        plan = plan_attention(positions, slots, pages, heads, window=window, num_sms=num_sms)
    decode(q, pages, positions, slots, page_table, kv_scales, plan.decode, window=window, pdl=pdl, out=out)
    if plan.prefill:
        prefill(q, pages, positions, slots, page_table, kv_scales, plan.prefill, window=window, pdl=pdl, out=out)
