"""PeerToPeer runs collectives by our own kernels, on memory of other ranks' GPUs that is mapped into this process."""

from __future__ import annotations

from collections.abc import Callable

from nanoflow_kernels.collectives import all_gather, reduce_scatter
from nanoflow_kernels.collectives.copy_engine import CopyEngine
from nanoflow_kernels.collectives.one_shot import all_reduce_one_shot
from nanoflow_kernels.collectives.peers import Peers
from nanoflow_kernels.collectives.tiles import room
from nanoflow_kernels.collectives.two_shot import all_reduce_two_shot
from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives

ONE_SHOT_BYTES = 256 * 1024  # to be measured on several GPUs: a one-shot all-reduce up to so many bytes of x


def buffer_bytes(
    ranks: int, tokens: int, width: int, element_size: int, *, one_shot_bytes: int = ONE_SHOT_BYTES
) -> int:
    """Bytes that the buffer of each rank needs for calls on up to so many tokens, their whole rows of 16 to `width`
    columns."""
    by_rows = room(ranks + 1, -(-tokens // ranks), width, element_size)
    by_columns = room(ranks + 1, tokens, -(-width // ranks), element_size)
    one_shot = 2 * ranks * one_shot_bytes  # rows are padded, at most to twice as many columns
    return 2 * max(by_rows, by_columns, one_shot)


class PeerToPeer(Collectives):
    """Collectives of the ranks that `peers` reaches; every rank has to have as many SMs and the same `one_shot_bytes`.

    An all-reduce of up to `one_shot_bytes` bytes is one-shot: each rank writes its whole input to all others. A larger
    one is two-shot: each rank sums some of the rows. With `copy_engine`, all-gathers are its copies and take no SMs.

    Args:
        close: gives the memory of `peers` back.
    """

    capturable = True

    def __init__(
        self,
        peers: Peers,
        *,
        one_shot_bytes: int = ONE_SHOT_BYTES,
        copy_engine: CopyEngine | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._peers, self._one_shot_bytes, self._copy_engine = peers, one_shot_bytes, copy_engine
        self._close = close

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
        (all_reduce_one_shot if is_small else all_reduce_two_shot)(x, self._peers, out=out, num_sms=num_sms)

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        reduce_scatter.reduce_scatter_columns(x, self._peers, out=out, num_sms=num_sms)

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        if self._copy_engine:
            self._copy_engine.all_gather_columns(x, out=out)
        else:
            all_gather.all_gather_columns(x, self._peers, out=out, num_sms=num_sms)

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        reduce_scatter.reduce_scatter_rows(x, self._peers, out=out, num_sms=num_sms)

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        if self._copy_engine:
            self._copy_engine.all_gather_rows(x, out=out)
        else:
            all_gather.all_gather_rows(x, self._peers, out=out, num_sms=num_sms)

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
        reduce_scatter.reduce_scatter_add_rms_norm_all_gather(
            residual, update, weight, self._peers, eps=eps, out=out, num_sms=num_sms
        )

    def abort(self) -> None:
        """See Collectives. Kernels read the word while they wait."""
        self._peers.abort.fill_(1)

    def close(self) -> None:
        """See Collectives."""
        self._close()
