"""Paged causal attention, softmax(q k^T / sqrt(d)) v: decodes and chunks of prompts in one batch, on grids of one size.

Shape legend: T tokens, H query heads, K kv heads, G = H / K query heads of a group, d head_dim, S slots, N pages of a
slot, P tokens a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoflow_kernels.attention_decode import decode
from nanoflow_kernels.attention_prefill import prefill
from nanoflow_kernels.attention_work import AttentionWork, list_work
from nanoflow_kernels.chain import is_chained
from nanoflow_kernels.operands import check_dtype, check_rows, check_shape


def attention(
    q: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    *,
    out: Tensor,
    num_sms: int | None = None,
    work: AttentionWork | None = None,
) -> None:
    """softmax(q k^T / sqrt(d)) v of each token over its request's keys at positions 0 .. its own.

    Rows of one slot are consecutive and ascending. Nothing beyond a request's last row enters the result: it may be
    NaN. A row at position -1 is padding and gets zeros. `work` is what list_work says of these positions and slots
    (with the same num_sms), for callers that have several layers; None: it is listed here.

    q [T, H d], pages [pages, 2, K, P, d], positions [T], slots [T], page_table [S, N] -> [T, H d]; int32, and
    one floating dtype.
    """
    kv_heads, _, head_dim = pages.shape[2:]
    check_rows("attention", q=q, out=out, page_table=page_table)
    check_dtype("attention", q.dtype, pages=pages, out=out)
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
    # Work listed here has just been launched: a kernel of the chain may read what is older.
    chained = work is not None and is_chained(len(q), q.device)
    if work is None:
        work = list_work(positions, slots, pages, heads, num_sms=num_sms)
    decode(q, pages, positions, slots, page_table, work, chained=chained, out=out)
    if work.prefill_programs:
        prefill(q, pages, positions, slots, page_table, work, out=out)
