"""Gloo runs collectives over torch.distributed's gloo backend, between processes and through the host's memory."""

from __future__ import annotations

import torch.distributed as dist

from nanoflow_backend.runtime.collectives.process_group import ProcessGroupCollectives


class Gloo(ProcessGroupCollectives):
    """Collectives of the default process group, which must be of the gloo backend and exist already.

    Raises:
        RuntimeError: this process has joined no group of the gloo backend.
    """

    capturable = False

    def __init__(self) -> None:
        backend = dist.get_backend() if dist.is_initialized() else None
        if backend != "gloo":
            raise RuntimeError(f"collectives: expected a process group of the gloo backend, got {backend}")
        super().__init__()

    def _group(self, num_sms: int | None) -> dist.ProcessGroup | None:
        return dist.group.WORLD
