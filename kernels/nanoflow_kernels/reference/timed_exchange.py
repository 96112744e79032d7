"""The local half of a collective whose other ranks are not there."""

from __future__ import annotations

import time

import torch
from torch import Tensor


def timed_exchange(x: Tensor, *, out: Tensor, scale: float, us: float, num_sms: int | None = None) -> None:
    """Compute out[r, c] = scale * sum over i, j of x[r % T + i * T', c % D + j * D'], and return `us` microseconds
    after the call, or later.

    x [T, D] -> [T', D'], of one dtype: blocks of a larger x are added up, those of a smaller one repeated. `num_sms`
    changes nothing here.
    """
    begin_s = time.perf_counter()
    (tokens, width), (rows, columns) = x.shape, out.shape
    if out.numel():
        row, column = (torch.arange(max(a, b)) % a for a, b in ((tokens, rows), (width, columns)))
        repeated, total = x.float()[row][:, column], torch.zeros(out.shape)
        for down in repeated.split(rows):
            for block in down.split(columns, 1):
                total[: block.shape[0], : block.shape[1]] += block
        out.copy_(scale * total)
    time.sleep(max(0.0, begin_s + 1e-6 * us - time.perf_counter()))
