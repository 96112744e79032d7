"""The two-shot all-reduce, for large messages: each rank sums some of the rows, and all get the sums of all.

exchange.py says how. What is small is faster in one shot (one_shot.py).
"""

from __future__ import annotations

from torch import Tensor

from nanoflow_kernels.checks import check_shape
from nanoflow_kernels.collectives.exchange import launch_exchange
from nanoflow_kernels.collectives.peers import Peers


def all_reduce_two_shot(x: Tensor, peers: Peers, *, out: Tensor, num_sms: int | None = None) -> None:
    """The ranks' sum, each rank summing some of the rows: x [T, D] -> [T, D], of one floating dtype.

    Raises:
        ValueError: names the operand whose shape, strides, dtype or device is not so, or num_sms if not positive; or
            says how large the peers' buffers have to be.
    """
    kernel = "all_reduce_two_shot"
    check_shape(kernel, "out", out, *x.shape)
    launch_exchange(kernel, x, peers, out, len(x), num_sms, scatter=True, gather=True)
