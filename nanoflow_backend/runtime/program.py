"""Program: a schedule compiled for a device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from nanoflow_backend.schedule.plan import Group


class Program(Protocol):
    """One rank's forward pass. `forward` and `head` may return before the device is done; their order is kept."""

    def groups(self, tokens: int) -> tuple[Group, ...]:
        """How the rows of a batch of `tokens` are to lie (see Group). The last ones may hold padding of the program."""
        ...

    def forward(self, token_ids: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor) -> None:
        """Run the batch through every layer; K and V go to the pages.

        token_ids, positions and slots are int32 [T], the rows of one slot ascending, and in each group
        consecutive; page_table is int32 [slots, pages], one tensor that is changed in place from step to step.
        """
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Logits, fp32 [R, vocabulary], of these rows (int64 [R]) of the last forward's batch."""
        ...
