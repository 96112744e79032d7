"""PeerToPeer runs collectives by our own kernels, on memory of other ranks' GPUs that is mapped into this process."""

from __future__ import annotations

from nanoflow_kernels.collectives import exchange
from nanoflow_kernels.collectives.one_shot import all_reduce_one_shot
from nanoflow_kernels.collectives.peers import Peers
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives

ONE_SHOT_BYTES = 256 * 1024  # to be measured on several GPUs: a one-shot all-reduce up to so many bytes of x


class PeerToPeer(Collectives):
    """Collectives of the ranks that `peers` reaches; every rank has to have as many SMs and the same `one_shot_bytes`.

    An all-reduce of up to `one_shot_bytes` bytes is one-shot: each rank writes its whole input to all others. A larger
    one is two-shot: each rank sums some of the rows.
    """

    capturable = True

    def __init__(self, peers: Peers, *, one_shot_bytes: int = ONE_SHOT_BYTES) -> None:
        self._peers, self._one_shot_bytes = peers, one_shot_bytes

    @property
    def ranks(self) -> int:
        """See Collectives."""
        return self._peers.ranks

    @property
    def rank(self) -> int:
        """See Collectives."""
        return self._peers.rank

    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        is_small = x.numel() * x.element_size() <= self._one_shot_bytes
        (all_reduce_one_shot if is_small else exchange.all_reduce_two_shot)(x, self._peers, out=out, num_sms=num_sms)

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        exchange.reduce_scatter_columns(x, self._peers, out=out, num_sms=num_sms)

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        exchange.all_gather_columns(x, self._peers, out=out, num_sms=num_sms)

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        exchange.reduce_scatter_rows(x, self._peers, out=out, num_sms=num_sms)

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        exchange.all_gather_rows(x, self._peers, out=out, num_sms=num_sms)

    def reduce_scatter_add_rms_norm_all_gather(
        self,
        residual: Tensor,
        update: Tensor,
        weight: Tensor,
        *,
        eps: float,
        out: tuple[Tensor, Tensor],
        num_sms: int | None = None,
    ) -> None:
        """See Collectives."""
        exchange.reduce_scatter_add_rms_norm_all_gather(
            residual, update, weight, self._peers, eps=eps, out=out, num_sms=num_sms
        )
