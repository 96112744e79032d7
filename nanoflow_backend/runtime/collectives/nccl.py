"""Nccl runs collectives over torch.distributed's NCCL backend: between GPUs, of one host or several."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _abort_process_group

from nanoflow_backend.runtime.collectives.group import environment
from nanoflow_backend.runtime.collectives.process_group import ProcessGroupCollectives

TIMEOUT = timedelta(minutes=10)  # until all ranks are connected
# Torch's watchdog would end this process, and say nothing to clients, when it misses a rank. We know of that before.
NO_HANDLING = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class Nccl(ProcessGroupCollectives):
    """Collectives of the ranks of the default process group, which meet over it. Each has a GPU of its own, device 0.

    Calls may fill as many SMs as their communicator says, so there is one for each `num_sms` that is asked for, made
    in its first call, which no graph may capture: a program runs every plan once before it captures it. All calls of a
    communicator run in the order of their launches, whatever their streams.

    NCCL reads its own variables of the environment, such as NCCL_NVLS_ENABLE=0.

    Raises:
        RuntimeError: the ranks cannot reach each other, as when two have the same GPU.
    """

    capturable = True

    def __init__(self) -> None:
        super().__init__()
        self._groups: dict[int | None, dist.ProcessGroup] = {}
        self._group(None)

    def _group(self, num_sms: int | None) -> dist.ProcessGroup:
        if num_sms not in self._groups:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"collectives: expected a call with num_sms {num_sms} before one is captured")
            device = torch.device("cuda", torch.cuda.current_device())  # given: ranks connect now, not in a later call
            with environment(NO_HANDLING):
                self._groups[num_sms] = dist.new_group(
                    backend="nccl", timeout=TIMEOUT, pg_options=_options(num_sms), device_id=device
                )
        return self._groups[num_sms]

    def abort(self) -> None:
        """See Collectives. On threads of its own: NCCL waits until the calls in flight have ended."""
        for group in list(self._groups.values()):
            threading.Thread(target=group.abort, name="abort", daemon=True).start()

    def close(self) -> None:
        """See Collectives. Not the way of torch.distributed, which waits for the others: they are gone."""
        for group in self._groups.values():
            _abort_process_group(group)
        self._groups.clear()


def _options(num_sms: int | None) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    if num_sms is not None:
        options.config.min_ctas, options.config.max_ctas = 1, num_sms
    return options
