"""The check of every collective against numpy in float64, the same for all implementations."""

from __future__ import annotations

import numpy as np
import torch
from support.comparison import assert_close
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives, rank_rows

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
NEIGHBOURS = 5  # poisoned columns beside an operand
EPS = 1e-5


def check_collectives(collectives: Collectives, tokens: int, dtype: torch.dtype, num_sms: int | None = None) -> None:
    """Run all collectives as one rank of the group; the others must do the same. Operands are columns of wider rows."""
    ranks, rank = collectives.ranks, collectives.rank
    width = 4 * ranks
    random = np.random.default_rng(tokens)
    mine = rank_rows(tokens, rank, ranks)
    rows, columns = slice(mine.start, mine.stop), slice(rank * 4, rank * 4 + 4)

    def normal(*shape: int) -> np.ndarray:
        """Numbers that the dtype holds exactly, the same on every rank."""
        return torch.from_numpy(random.standard_normal(shape)).to(dtype).double().numpy()

    def there(values: np.ndarray) -> Tensor:
        wide = torch.full((len(values), values.shape[1] + NEIGHBOURS), torch.nan, dtype=dtype)
        wide[:, : values.shape[1]] = torch.from_numpy(values)
        return wide[:, : values.shape[1]]

    def close(name: str, actual: Tensor, expected: np.ndarray) -> None:
        assert_close(f"{name} of rank {rank} of {ranks}", actual, torch.from_numpy(expected), TOLERANCE[dtype])
        base = actual._base
        assert base is not None
        assert base[:, actual.shape[1] :].isnan().all(), f"{name}: columns beside the output were written"

    def empty(like: np.ndarray) -> Tensor:
        return there(np.full(like.shape, np.nan))

    each = normal(ranks, tokens, width)
    total = each.sum(0)
    for name, given, expected in (
        ("all_reduce", each[rank], total),
        ("reduce_scatter_columns", each[rank], total[:, columns]),
        ("all_gather_columns", total[:, columns], total),
        ("reduce_scatter_rows", each[rank], total[rows]),
        ("all_gather_rows", total[rows], total),
    ):
        x, out = there(given), empty(expected)
        getattr(collectives, name)(x, out=out, num_sms=num_sms)
        close(name, out, expected)

    residual, weight = normal(tokens, width), normal(width)
    stream = residual + total
    norm = stream / np.sqrt((stream**2).mean(1, keepdims=True) + EPS) * weight
    kept, normed = empty(stream[rows]), empty(norm)
    collectives.reduce_scatter_add_rms_norm_all_gather(
        there(residual[rows]),
        there(each[rank]),
        torch.from_numpy(weight).to(dtype),
        eps=EPS,
        out=(kept, normed),
        num_sms=num_sms,
    )
    close("kept", kept, stream[rows])
    close("normed", normed, norm)
