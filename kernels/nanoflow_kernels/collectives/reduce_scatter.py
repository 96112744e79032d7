"""Reduce-scatter: of the ranks' sum, a rank gets its rows or its columns; exchange.py says how.

Shape legend: T tokens, D columns of the whole row, n ranks, t rows of one rank.
"""

from __future__ import annotations

from torch import Tensor

from nanoflow_kernels.checks import check_dtype, check_rows, check_shape
from nanoflow_kernels.collectives.exchange import launch_exchange
from nanoflow_kernels.collectives.peers import Peers
from nanoflow_kernels.collectives.tiles import own_rows


def reduce_scatter_rows(x: Tensor, peers: Peers, *, out: Tensor, num_sms: int | None = None) -> None:
    """This rank's rows of the ranks' sum: x [T, D] -> [t, D], of one floating dtype.

    t = ceil(T / n), on the last ranks less.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive; or
            says how large the peers' buffers have to be.
    """
    kernel = "reduce_scatter_rows"
    check_shape(kernel, "out", out, own_rows(len(x), peers), x.shape[1])
    launch_exchange(kernel, x, peers, out, len(x), num_sms, scatter=True)


def reduce_scatter_columns(x: Tensor, peers: Peers, *, out: Tensor, num_sms: int | None = None) -> None:
    """This rank's columns of the ranks' sum: x [T, D] -> [T, D / n], of one floating dtype.

    Raises:
        ValueError: as of `reduce_scatter_rows`.
    """
    kernel = "reduce_scatter_columns"
    check_shape(kernel, "x", x, len(out), peers.ranks * out.shape[1])
    launch_exchange(kernel, x, peers, out, len(x), num_sms, columns=True, scatter=True)


def reduce_scatter_add_rms_norm_all_gather(
    residual: Tensor,
    update: Tensor,
    weight: Tensor,
    peers: Peers,
    *,
    eps: float,
    out: tuple[Tensor, Tensor],
    num_sms: int | None = None,
) -> None:
    """Sum the ranks' updates on this rank's rows, add them to the residual, norm, and gather the ranks' normed rows.

    residual [t, D], update [T, D], weight [D] -> kept [t, D], normed [T, D], of one floating dtype; t as of
    `reduce_scatter_rows`. The sum is rounded as `reduce_scatter_rows` rounds it, so the two forms keep the same bits.

    Raises:
        ValueError: as of `reduce_scatter_rows`.
    """
    kernel = "reduce_scatter_add_rms_norm_all_gather"
    kept, normed = out
    own = own_rows(len(update), peers), update.shape[1]
    check_rows(kernel, update=update, residual=residual, kept=kept)
    check_dtype(kernel, update.dtype, residual=residual, weight=weight, kept=kept)
    check_shape(kernel, "residual", residual, *own)
    check_shape(kernel, "kept", kept, *own)
    check_shape(kernel, "normed", normed, *update.shape)
    check_shape(kernel, "weight", weight, update.shape[1])
    launch_exchange(
        kernel, update, peers, normed, len(update), num_sms,
        scatter=True, gather=True, norm=(residual, weight, kept, eps),
    )  # fmt: skip
