"""All-gather: every rank gets the rows or the columns of all; exchange.py says how.

Shape legend: T tokens, D columns of the whole row, n ranks, t rows of one rank.
"""

from __future__ import annotations

from torch import Tensor

from nanoflow_kernels.checks import check_shape
from nanoflow_kernels.collectives.exchange import launch_exchange
from nanoflow_kernels.collectives.peers import Peers
from nanoflow_kernels.collectives.tiles import own_rows


def all_gather_rows(x: Tensor, peers: Peers, *, out: Tensor, num_sms: int | None = None) -> None:
    """The ranks' rows one below the other: x [t, D] -> [T, D], of one dtype; t as of `reduce_scatter_rows`.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive; or
            says how large the peers' buffers have to be.
    """
    kernel = "all_gather_rows"
    check_shape(kernel, "x", x, own_rows(len(out), peers), out.shape[1])
    launch_exchange(kernel, x, peers, out, len(out), num_sms, gather=True)


def all_gather_columns(x: Tensor, peers: Peers, *, out: Tensor, num_sms: int | None = None) -> None:
    """The ranks' columns side by side: x [T, D / n] -> [T, D], of one dtype.

    Raises:
        ValueError: as of `all_gather_rows`.
    """
    kernel = "all_gather_columns"
    check_shape(kernel, "out", out, len(x), peers.ranks * x.shape[1])
    launch_exchange(kernel, x, peers, out, len(out), num_sms, columns=True, gather=True)
