"""OneRank is the collectives of a group of one, on any device."""

from __future__ import annotations

from torch import Tensor

from nanoflow_backend.runtime.collectives.protocol import Collectives


class OneRank(Collectives):
    """A rank without others: every exchange is a copy. Programs that work in place launch none (see Binding)."""

    ranks = 1
    rank = 0
    capturable = True

    def all_reduce(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        out.copy_(x)

    def reduce_scatter_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        out.copy_(x)

    def all_gather_columns(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        out.copy_(x)

    def reduce_scatter_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        out.copy_(x)

    def all_gather_rows(self, x: Tensor, *, out: Tensor, num_sms: int | None = None) -> None:
        """See Collectives."""
        out.copy_(x)
