"""Program is the interface of a schedule compiled for a device: what the worker calls in every step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from nanoflow_backend.runtime.binding import FittedPlan
from nanoflow_backend.runtime.launch_watcher import LaunchWatcher


class Program(Protocol):
    """One rank's forward pass. `forward` and `head` may return before the device is done; their order is kept."""

    def plan_for(self, tokens: int, decode_kv_tokens: int) -> FittedPlan:
        """What a batch of `tokens` runs under, whose decodes read so many tokens of the KV cache.

        Raises:
            ValueError: more tokens than the program is for.
        """
        ...

    def forward(
        self, plan: FittedPlan, token_ids: Tensor, positions: Tensor, slots: Tensor, page_table: Tensor
    ) -> None:
        """Run the batch through every layer, as `plan_for` has said; K and V go to the pages.

        token_ids, positions and slots are int32 [T], the rows of one slot ascending, and in each of the plan's groups
        consecutive; page_table is int32 [slots, pages], one tensor that is changed in place from step to step.
        """
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Logits, fp32 [R, vocabulary], of these rows (int64 [R]) of the last forward's batch."""
        ...

    def fill(self, page_table: Tensor) -> None:
        """Take all the memory that any batch will need. The pages may hold anything afterwards."""
        ...

    def warm_up(self, page_table: Tensor) -> None:
        """Compile and capture whatever batches will run, so that none of them waits for it."""
        ...

    def watch(self, watcher: LaunchWatcher | None) -> None:
        """From the next batch on, `watcher` makes the launches of the layers; None: nobody looks on."""
        ...

    def close(self) -> None:
        """Forget what was captured, when nothing runs any more: graphs hold the collectives. Harmless when repeated."""
        ...
