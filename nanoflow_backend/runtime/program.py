"""Program: a schedule compiled for a device."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Program(Protocol):
    """One rank's forward pass. Both calls may return before the device is done; their order is kept."""

    def forward(self, token_ids: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor) -> None:
        """Run the batch through every layer; K and V go to the pages.

        token_ids, positions and slots are int32 [T], the rows of one slot consecutive and ascending; page_table is
        int32 [slots, pages], one tensor that is changed in place from step to step.
        """
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Logits, fp32 [R, vocabulary], of these rows (int64 [R]) of the last forward's batch."""
        ...
